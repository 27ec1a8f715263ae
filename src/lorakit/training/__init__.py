"""Training: data, the bridge to transformers' and TRL's trainers, one whole run with its report."""

from lorakit.training.bridge import AdapterTrainer, AdapterTrainerMixin

__all__ = ["AdapterTrainer", "AdapterTrainerMixin"]
