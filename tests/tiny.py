"""Tiny random transformers models, the same for the same seed: whole architectures at the price of a unit test."""

from __future__ import annotations

import torch
import transformers as tf
from torch import Tensor, nn

VOCAB = 48


def llama(tied: bool = False, seed: int = 0, layers: int = 2, **kw) -> nn.Module:
    """Grouped-query attention: 4 heads over 2 key-value heads."""
    torch.manual_seed(seed)
    return tf.LlamaForCausalLM(tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, tie_word_embeddings=tied, initializer_range=0.2, bos_token_id=1, eos_token_id=2, **kw)).eval()


def gpt2(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tf.GPT2LMHeadModel(tf.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2, bos_token_id=1, eos_token_id=2)).eval()


def bert(seed: int = 0, num_labels: int = 3) -> nn.Module:
    torch.manual_seed(seed)
    return tf.BertForSequenceClassification(tf.BertConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32,
        num_labels=num_labels, initializer_range=0.2)).eval()


def opt(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tf.OPTForCausalLM(tf.OPTConfig(
        vocab_size=VOCAB, hidden_size=16, word_embed_proj_dim=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=32, init_std=0.2)).eval()


def vit(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return tf.ViTForImageClassification(tf.ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4, num_labels=3)).eval()


def t5(seed: int = 0) -> nn.Module:
    """An encoder-decoder with tied embeddings."""
    torch.manual_seed(seed)
    return tf.T5ForConditionalGeneration(tf.T5Config(
        vocab_size=VOCAB, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0, initializer_factor=0.3)).eval()


def bart(seed: int = 0) -> nn.Module:
    """An encoder-decoder whose embeddings are scaled."""
    torch.manual_seed(seed)
    return tf.BartForConditionalGeneration(tf.BartConfig(
        vocab_size=VOCAB, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_position_embeddings=32, init_std=0.2, scale_embedding=True, forced_eos_token_id=None)).eval()


def mixtral(seed: int = 0) -> nn.Module:
    """Four fused experts, two of them for each token."""
    torch.manual_seed(seed)
    return tf.MixtralForCausalLM(tf.MixtralConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32, initializer_range=0.2)).eval()


def gemma3(seed: int = 0) -> nn.Module:
    """Tied embeddings, scaled when they are looked up."""
    torch.manual_seed(seed)
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        max_position_embeddings=32, initializer_range=0.2, sliding_window=16)).eval()


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "opt": opt}


def ids(rows: int = 3, length: int = 7) -> Tensor:
    """Token ids away from the special ones."""
    return torch.randint(4, VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def logits(model: nn.Module, x: Tensor | None = None) -> Tensor:
    x = ids() if x is None else x
    more = {"decoder_input_ids": x[:, :4]} if model.config.is_encoder_decoder else {}
    return model(input_ids=x, **more).logits
