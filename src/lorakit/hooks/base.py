"""The contract of a hook, its registry, and what calls the hooks: the same object under a Trainer and in a loop of your own.

Order within one optimiser step, number t (from 0): before_forward(t) → forward, extra_loss, backward (every micro-batch) → gradients
of several tasks made one → clipping → before_step(t) (gradients alive) → optimiser step → after_step(t) (gradients still alive) →
scheduler → zero_grad → on_interval(t + 1). Of several hooks at one event those with the smaller `place` come first, then as given:
10 gradients of tasks, 30 preconditioners, 40 masks on updates, 50 the rest (scores, pruning), 80 merging and restarts, 90 learning rates.
Anything random is drawn with `surgery.draw(seed, step, …)`: the same in every process, and nothing of it to save.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lorakit import host
from lorakit.errors import LorakitError, near
from lorakit.hooks.losses import Losses
from lorakit.method import checked

HOOKS: dict[str, type[Hook]] = {}


class Hook:
    """Does nothing; subclasses override what they need. Hyper-parameters are dataclass fields, the rest is state."""

    name: str
    title: str
    paper: str = ""
    formula: str = ""
    place: ClassVar[int] = 50  # among several hooks at one event, the smaller the earlier
    tasks: int = 0  # how many tasks' gradients `combine` wants apart; 0: none
    held: float = 0.0  # share of the training rows kept out of training, on which it learns by itself; 0: none
    seed: int = 0  # of what is drawn
    losses: Losses  # of a hook with `held`: losses of this step and of those rows
    trains_in_parallel: ClassVar[bool] = True  # whether several processes may train with it

    def setup(self, model: nn.Module) -> None:
        """Once, before the optimiser exists: may add or freeze parameters, and put things on the model that `close` takes off."""

    def param_groups(self, model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The optimiser's groups, from those made so far."""
        return groups

    def start(self, model: nn.Module, optimizer: torch.optim.Optimizer, total: int | None) -> None:
        """Training begins, or goes on (after `load_state_dict`); total: steps there will have been at its end, where that is known."""

    def before_forward(self, model: nn.Module, step: int) -> None: ...

    def extra_loss(self, model: nn.Module, outputs: Any) -> Tensor | float:
        return 0.0

    def combine(self, model: nn.Module, grads: Tensor) -> Tensor:
        """One gradient (n) from those of the tasks (tasks, n), all processes' together."""
        return grads.sum(0)

    def before_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None: ...

    def after_step(self, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None: ...

    def on_interval(self, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: Any, step: int) -> None: ...

    def before_save(self, model: nn.Module, path: Path) -> None: ...

    def close(self, model: nn.Module) -> None:
        """Training is over: takes off what `setup` put on the model. What was learnt stays."""

    def summary(self) -> str:
        """What it came to, in a line for people, when training is over; "" where there is nothing to say."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on to the bit: counters, masks, averages."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After `setup`, before the adapter's tensors are read and the optimiser's state is."""


def hook(name: str, title: str, paper: str = "", formula: str = "") -> Callable[[type], type]:
    """Class decorator: a dataclass registered under `name`."""

    def add(cls: type) -> type:
        cls = dataclass(checked(cls, name))
        cls.name, cls.title, cls.paper, cls.formula, HOOKS[name] = name, title, paper, formula, cls
        return cls

    return add


def build(config: dict[str, dict[str, Any]] | str) -> Hook:
    """A hook from a configuration entry: "lora_plus" or {"lora_plus": {"ratio": 16}}."""
    name, options = (config, {}) if isinstance(config, str) else next(iter(config.items()))
    name = name.replace("-", "_")
    if name not in HOOKS:
        raise LorakitError(f"hooks: unknown hook `{name}`{near(name, HOOKS)}")
    fields = [f.name for f in dataclasses.fields(HOOKS[name])]
    for k in options or {}:
        if k not in fields:
            raise LorakitError(f"hooks: {name} has no option `{k}`{near(k, fields)}")
    try:
        return HOOKS[name](**(options or {}))
    except TypeError as e:
        raise LorakitError(f"hooks: {name}: a value of the wrong kind ({e})") from None


class Hooks:
    """Several hooks as one: calls each event in order. A Trainer (through `AdapterTrainerMixin`) and `hooked` both hold one of these."""

    def __init__(self, model: nn.Module, hooks: Sequence[Hook]):
        self.model, self.hooks = host.bare(model), list(hooks)
        self.order = sorted(self.hooks, key=lambda h: h.place)
        apart = [h for h in self.hooks if h.tasks]
        if len(apart) > 1:
            raise LorakitError(f"hooks: {apart[0].name} and {apart[1].name} both make one gradient of several; mend: one of them")
        self.combiner = apart[0] if apart else None
        learners = [h for h in self.hooks if h.held]
        if len(learners) + bool(learners and apart) > 1:
            other = (learners[1:] + apart)[0]
            raise LorakitError(f"hooks: {learners[0].name} and {other.name} both have a say in what a step's loss is; mend: one of them")
        self.learner, self.losses = learners[0] if learners else None, Losses()
        if self.learner:
            self.learner.losses = self.losses
        self._of_task: dict[int, list[Tensor]] = {}
        self.open = False

    def setup(self) -> None:
        if not self.open:
            self.open = True
            for h in self.order:
                h.setup(self.model)

    def close(self) -> None:
        if self.open:
            self.open = False
            for h in reversed(self.order):
                h.close(self.model)

    def param_groups(self, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for h in self.order:
            groups = h.param_groups(self.model, groups)
        return groups

    def start(self, optimizer: torch.optim.Optimizer, total: int | None) -> None:
        parallel = torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
        for h in self.order:
            if parallel and not h.trains_in_parallel:
                raise LorakitError(f"hooks: {h.name} does not train in several processes; mend: one process")
            h.start(self.model, optimizer, total)
        if self.learner and self.losses.apart is None:
            raise LorakitError(f"{self.learner.name}: it learns on rows kept out of training, and was given none; mend: hooked(…, held=batches), or a "
                               "Trainer with a train_dataset, which parts them itself")

    def before_forward(self, step: int) -> None:
        for h in self.order:
            h.before_forward(self.model, step)

    def extra_loss(self, outputs: Any) -> Tensor | float:
        return sum((h.extra_loss(self.model, outputs) for h in self.order), 0.0)

    def before_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        for h in self.order:
            h.before_step(self.model, optimizer, step)

    def after_step(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        self.losses.now.clear()
        for h in self.order:
            h.after_step(self.model, optimizer, step)

    def on_interval(self, optimizer: torch.optim.Optimizer, scheduler: Any, step: int) -> None:
        for h in self.order:
            h.on_interval(self.model, optimizer, scheduler, step)

    def before_save(self, path: Path) -> None:
        for h in self.order:
            h.before_save(self.model, path)

    def state_dict(self) -> list[dict[str, Any]]:
        return [{"hook": getattr(h, "name", type(h).__name__), "state": h.state_dict()} for h in self.hooks]

    def load_state_dict(self, saved: list[dict[str, Any]]) -> None:
        had, have = [s["hook"] for s in saved], [getattr(h, "name", type(h).__name__) for h in self.hooks]
        if had != have:
            raise LorakitError(f"the checkpoint holds the state of the hooks {had}, this training has {have}; mend: the same hooks in the same order")
        for h, s in zip(self.hooks, saved, strict=True):
            h.load_state_dict(s["state"])

    # Gradients of several tasks

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def keep(self, task: int) -> None:
        """What `backward` has just left in the gradients is this task's: puts it aside."""
        if not 0 <= task < self.combiner.tasks:
            raise LorakitError(f"{self.combiner.name}: tasks are numbered 0 to {self.combiner.tasks - 1}, this batch has {task}; mend: tasks: {task + 1}")
        params = self._trained()
        bank = self._of_task.setdefault(task, [torch.zeros_like(p) for p in params])
        for p, kept in zip(params, bank, strict=True):
            if p.grad is not None:
                kept.add_(p.grad)
                p.grad = None

    @torch.no_grad()
    def combine(self) -> None:
        """Makes one gradient of those put aside, which are of all processes together."""
        if self.combiner is None:
            return
        params = self._trained()
        empty = torch.cat([torch.zeros_like(p).flatten() for p in params])
        rows = [torch.cat([t.flatten() for t in self._of_task[k]]) if k in self._of_task else empty for k in range(self.combiner.tasks)]
        grads = torch.stack(rows)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(grads)
            grads /= torch.distributed.get_world_size()
        whole = self.combiner.combine(self.model, grads)
        for p, g in zip(params, whole.split([p.numel() for p in params]), strict=True):
            p.grad = g.view_as(p).clone()
        self._of_task.clear()


class Step:
    """One optimiser step of a hand-written loop, with everything around it. Made by `hooked`."""

    def __init__(self, hooks: Hooks, optimizer: torch.optim.Optimizer, scheduler: Any, max_grad_norm: float, of: Loss):
        self.hooks, self.optimizer, self.scheduler, self.max_grad_norm, self.of, self.done = hooks, optimizer, scheduler, max_grad_norm, of, 0
        self._fresh = True

    def _forward(self, module, args) -> None:
        """The first forward pass of a step."""
        if self._fresh and module.training:
            self._fresh = False
            self.hooks.before_forward(self.done)

    def extra_loss(self, outputs: Any = None) -> Tensor | float:
        """What the hooks add to the loss."""
        return self.hooks.extra_loss(outputs)

    def loss(self, batch: Any, share: float = 1.0) -> Tensor:
        """The loss of a batch with what the hooks add; a hook with rows of its own may compute it again. share: of the step, with micro-batches."""

        def compute() -> Tensor:
            answer = self.of(self.hooks.model, batch)
            return (loss_of(answer) + self.hooks.extra_loss(None if isinstance(answer, Tensor) else answer)) * share

        if self.hooks.learner:
            self.hooks.losses.note(compute)
        return compute()

    def backward(self, losses: dict[int, Tensor] | Sequence[Tensor]) -> None:
        """Instead of `loss.backward()`, with a hook that wants the tasks' gradients apart: one loss for each task, by its number."""
        pairs = list(losses.items() if isinstance(losses, dict) else enumerate(losses))
        for n, (task, loss) in enumerate(pairs):
            loss.backward(retain_graph=n + 1 < len(pairs))
            self.hooks.keep(task)

    def __call__(self) -> None:
        model, optimizer = self.hooks.model, self.optimizer
        self.hooks.combine()
        if self.max_grad_norm:
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], self.max_grad_norm)
        self.hooks.before_step(optimizer, self.done)
        optimizer.step()
        self.hooks.after_step(optimizer, self.done)
        if self.scheduler is not None:
            self.scheduler.step()
        optimizer.zero_grad()
        model.zero_grad()
        self.done += 1
        self.hooks.on_interval(optimizer, self.scheduler, self.done)
        self._fresh = True  # not before: a hook may run the model for itself

    def state_dict(self) -> dict[str, Any]:
        """To save beside the adapter, the optimiser's state and the scheduler's."""
        return {"done": self.done, "hooks": self.hooks.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Before the adapter's tensors and the optimiser's state are loaded."""
        self.done = state["done"]
        self.hooks.load_state_dict(state["hooks"])


Make = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]
Loss = Callable[[nn.Module, Any], Any]  # of a model and a batch: the loss, or an answer that has it as `.loss`


def own_answer(model: nn.Module, batch: dict[str, Any]) -> Any:
    """What the model itself says of a batch with labels."""
    return model(**batch)


def loss_of(answer: Any) -> Tensor:
    return answer if isinstance(answer, Tensor) else answer.loss


@contextmanager
def hooked(model: nn.Module, optimizer: Make, hooks: Sequence[Hook], scheduler: Callable[[torch.optim.Optimizer], Any] | None = None, *, lr: float = 1e-3,
           weight_decay: float = 0.0, max_grad_norm: float = 0.0, total: int | None = None, state: dict[str, Any] | None = None,
           held: Sequence[Any] = (), loss: Loss = own_answer) -> Iterator[Step]:
    """Inside the block the hooks are on: `with hooked(model, torch.optim.AdamW, hooks) as step: loss.backward(); step()`.

    optimizer, scheduler: what makes them, of parameter groups and of the optimiser, since hooks have a say in both; then they are
    `step.optimizer` and `step.scheduler`. total: how many steps there will be, for hooks that need to know. state: an earlier
    `step.state_dict()`, to go on from there. held: batches that are not trained on (`parted` draws their rows), for a hook that learns on rows of
    its own; with one it is `step.loss(batch).backward(); step()`, where `loss` says what the loss of model and batch is.
    """
    every = Hooks(model, hooks)
    every.setup()
    handle = None
    try:
        trained = [p for p in every.model.parameters() if p.requires_grad]
        made = optimizer(every.param_groups([{"params": trained, "lr": lr, "weight_decay": weight_decay}]))
        step = Step(every, made, scheduler and scheduler(made), max_grad_norm, loss)
        if held:
            every.losses.apart = lambda k: loss_of(loss(every.model, held[k % len(held)]))
        if state is not None:
            step.load_state_dict(state)
        every.start(made, total)
        handle = every.model.register_forward_pre_hook(step._forward, prepend=True)  # before what hooks do at a forward pass
        yield step
    finally:
        if handle is not None:
            handle.remove()
        every.close()
