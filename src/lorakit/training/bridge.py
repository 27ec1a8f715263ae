"""Adapters under transformers' Trainer and TRL's trainers: one mixin, because saving has no callback before it.

    class MyTrainer(AdapterTrainerMixin, SFTTrainer): pass
    trainer = MyTrainer(model=adapted, args=…, train_dataset=…, hooks=[LoRAPlus()])
    trainer.train(resume_from_checkpoint=True)        # goes on to the bit

Checkpoints hold what trains and the hooks' state, never the base. `AdapterTrainer` is the mixin over Trainer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import save_fsdp_optimizer
from torch import nn
from torch.utils.data import Subset
from transformers import Trainer, TrainerCallback

from lorakit import host
from lorakit.errors import LorakitError
from lorakit.formats import folder
from lorakit.hooks import Hook, Hooks
from lorakit.hooks.losses import batch_of, parted
from lorakit.stores.shards import sharded

HOOK_STATE, SCHEDULER = "lorakit_hooks.pt", "scheduler.pt"


class HookCallback(TrainerCallback):
    """Calls the hooks at Trainer's events; gradients are alive in before_step and after_step, once per optimiser step."""

    def __init__(self, hooks: Hooks):
        self.hooks = hooks

    def on_train_begin(self, args, state, control, optimizer=None, **kw):
        self.hooks.setup()
        self.hooks.start(optimizer, state.max_steps)

    def on_step_begin(self, args, state, control, **kw):
        self.hooks.before_forward(state.global_step)

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kw):
        self.hooks.before_step(optimizer, state.global_step)

    def on_optimizer_step(self, args, state, control, optimizer=None, **kw):
        self.hooks.after_step(optimizer, state.global_step)

    def on_step_end(self, args, state, control, optimizer=None, lr_scheduler=None, **kw):
        self.hooks.on_interval(optimizer, lr_scheduler, state.global_step)

    def on_train_end(self, args, state, control, **kw):
        self.hooks.close()


class AdapterTrainerMixin:
    """Put before a Trainer class. `hooks`: what happens while training; `lineage`: what the receipts say came before."""

    def __init__(self, *args: Any, hooks: Sequence[Hook] = (), lineage: Sequence[dict] = (), **kw: Any):
        model = kw.get("model", args[0] if args else None)
        if not isinstance(model, nn.Module) or not any(isinstance(m, host.Host) for m in model.modules()):
            raise LorakitError("the model has no adapters; mend: lorakit.adapt(model, ...) before making the trainer")
        self.hooks, self.lineage = list(hooks), list(lineage)
        self._every = Hooks(model, self.hooks)
        self._every.setup()
        super().__init__(*args, **kw)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version == 1:
            raise LorakitError("FSDP1 flattens an adapter into the tensors of the base around it, out of which it cannot be saved; mend: "
                               "fsdp_config: {version: 2}")
        head = self.model.get_output_embeddings() if hasattr(self.model, "get_output_embeddings") else None
        if isinstance(head, host.Host) and "forward" in vars(self.model):
            raise LorakitError("this trainer computes its loss from the output head's weight without calling it, so the adapter on the "
                               "head would be skipped silently; mend: exclude_modules: lm_head")
        self.add_callback(HookCallback(self._every))
        if self._every.learner and self.train_dataset is not None:
            self._part(self._every.learner)

    def _part(self, hook: Hook) -> None:
        """Takes the rows on which a hook learns by itself out of the training rows."""
        rows = self.train_dataset
        if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
            raise LorakitError(f"{hook.name}: it keeps {hook.held:g} of the training rows apart, and these are a stream; mend: a data set with a length")
        size, take = self._train_batch_size, rows.select if hasattr(rows, "select") else partial(Subset, rows)
        train, apart = (take(at) for at in parted(len(rows), hook.held, hook.seed))
        self.train_dataset = train
        if hasattr(apart, "select"):
            apart, collate = self._remove_unused_columns(apart, "rows kept apart"), self.data_collator
        else:
            collate = self._get_collator_with_removed_columns(self.data_collator, "rows kept apart")

        def loss(k: int) -> torch.Tensor:
            inputs = self._prepare_inputs(collate([apart[n] for n in batch_of(len(apart), size, k, hook.seed)]))
            with self.compute_loss_context_manager():
                return super(AdapterTrainerMixin, self).compute_loss(self.model, inputs)

        self._every.losses.apart = loss

    def _trained(self) -> list[str]:
        """Adapters with something that trains; all of them if none does."""
        model = self.accelerator.unwrap_model(self.model)
        specs = list(host.state_of(model).specs)
        trains = {a for m in model.modules() if isinstance(m, host.Leaves) for a, p in m._parameters.items() if p.requires_grad}
        return [a for a in specs if a in trains] or specs

    def _folders(self, path: str | Path) -> dict[str, Path]:
        names = self._trained()
        return {names[0]: Path(path)} if len(names) == 1 else {n: Path(path) / n for n in names}

    def create_optimizer(self, *args: Any, **kw: Any):
        away = next((n for n, p in self.model.named_parameters() if p.requires_grad and p.device.type == "meta"), None)
        if away:
            raise LorakitError(f"{away} has no values here (offloaded with the block around it?), so training would change nothing; mend: adapt the "
                               "model after offloading it, and offload it without preload_module_classes")
        if self.optimizer is None and self.hooks:
            cls, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            decay = set(self.get_decay_parameter_names(self.model))
            named = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
            groups = [{"params": [p for n, p in named if (n in decay) == wd], "lr": options["lr"],
                       "weight_decay": self.args.weight_decay if wd else 0.0} for wd in (True, False)]
            groups = [g for g in groups if g["params"]]
            self.optimizer = cls(self._every.param_groups(groups), **options)
        return super().create_optimizer(*args, **kw)

    def compute_loss(self, model, inputs, return_outputs=False, **kw):
        if not self.hooks:
            return super().compute_loss(model, inputs, return_outputs=return_outputs, **kw)
        if model.training and self._every.learner:
            self._every.losses.note(partial(self._again, model, dict(inputs), kw))
        loss, outputs, _ = self._step_loss(model, inputs, kw)
        return (loss, outputs) if return_outputs else loss

    def _again(self, model, inputs, kw):
        """The loss of a training step's batch once more, as it was differentiated."""
        with self.compute_loss_context_manager():
            loss, _, whole = self._step_loss(model, dict(inputs), kw)
        return loss if whole else loss / self.current_gradient_accumulation_steps

    def _step_loss(self, model, inputs, kw):
        """(loss with what hooks add, outputs, whether it is over all micro-batches already, so that Trainer does not divide by their number)"""
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kw)
        whole = None
        if model.training:
            whole = self.loss_is_scaled_for_ga
            if whole is None:
                whole = bool(self.model_accepts_loss_kwargs and kw.get("num_items_in_batch") is not None) or self.compute_loss_func is not None
            loss = loss if whole else loss * self._share
            loss = loss + self._every.extra_loss(outputs) * (self._share / self.current_gradient_accumulation_steps if whole else self._share)
        return loss, outputs, whole

    _share = 1.0  # of the micro-batch's rows, while one task's are on

    def training_step(self, model, inputs, *args, **kw):
        """With a hook that wants tasks' gradients apart: a backward pass for each task in the batch, told by its tensor `task`."""
        if self._every.combiner is None:
            return super().training_step(model, inputs, *args, **kw)
        if "task" not in inputs:
            raise LorakitError(f"{self._every.combiner.name}: the batch has no tensor `task` with the number of each row's task; mend: a column `task`, "
                               "remove_unused_columns: false, and a collator that keeps it")
        inputs = dict(inputs)
        task = inputs.pop("task").flatten().cpu()
        loss = 0.0
        for k in task.unique().tolist():
            rows = (task == k).nonzero().squeeze(1)
            part = {n: t[rows.to(t.device)] if isinstance(t, torch.Tensor) and t.dim() and len(t) == len(task) else t for n, t in inputs.items()}
            self._share = len(rows) / len(task)
            try:
                with self.accelerator.no_sync(model):  # the tasks' gradients are summed over processes apart, by the hooks
                    loss = loss + super().training_step(model, part, *args, **kw)
            finally:
                self._share = 1.0
            self._every.keep(k)
        if self.accelerator.sync_gradients:
            self._every.combine()
        return loss

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_fsdp_enabled:
            return super().save_model(output_dir, _internal_call)
        self._save(output_dir)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Writes in one process; where the model is spread over several, all of them gather."""
        model = self.accelerator.unwrap_model(self.model)
        if not self.args.should_save and not sharded(model):
            return
        path = Path(output_dir or self.args.output_dir)
        self._every.before_save(path)
        for name, where in self._folders(path).items():
            folder.save(model, where, name, form="native", lineage=self.lineage)
        if not self.args.should_save:
            return
        if self.hooks:
            torch.save(self._every.state_dict(), path / HOOK_STATE)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(path)
        torch.save(self.args, path / "training_args.bin")

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """FSDP's optimiser state alone; Trainer would write the whole base beside it."""
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        sharded(self.model)
        save_fsdp_optimizer(self.accelerator.state.fsdp_plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER)
        return None

    def _read(self, path: str | Path) -> None:
        """The hooks' state first: what training took into the base belongs to the adapter beside it."""
        states = Path(path) / HOOK_STATE
        if states.is_file():
            self._every.load_state_dict(torch.load(states, weights_only=True))
        model = self.accelerator.unwrap_model(self.model)
        for name, where in self._folders(path).items():
            folder.fill(model, name, folder.Folder(where))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        self._read(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        self._read(self.state.best_model_checkpoint)


class AdapterTrainer(AdapterTrainerMixin, Trainer):
    """transformers' Trainer for an adapted model."""
