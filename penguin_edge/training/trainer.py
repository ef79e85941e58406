"""The four training stages: one configuration, one thin loop over `accelerate`.

    records -> Order (which samples make which step) -> worker processes build and pack -> forward_packed ->
    cross entropy (+ distillation in stage 1) -> AdamW -> log.jsonl, step-*/ and model/ in the out folder

The same (seed, data, settings) give the same losses bit for bit on one machine: with any number of loader workers, and
across a kill and a resume. Several processes (`torchrun`) share each step; a sum over processes comes in another order
of addition, so their losses agree to rounding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from penguin_edge.dataset.samples import SampleBuilder
from penguin_edge.errors import CheckpointError, InputError
from penguin_edge.files import write_json
from penguin_edge.folders import clear_all, held
from penguin_edge.model.checkpoint import Checkpoint, encoder_fingerprint, read_encoder
from penguin_edge.model.penguin import PenguinModel
from penguin_edge.prompt.tokenizer import Tokenizer
from penguin_edge.training.feed import Corpus, Delivery, Micro, Run, deliveries, measured_lengths, steps_of
from penguin_edge.training.initialise import initialise
from penguin_edge.training.losses import Distiller, count_items
from penguin_edge.training.order import Order, stable_seed
from penguin_edge.training.packing import checkpoint_blocks
from penguin_edge.training.processes import NonFiniteLoss, accelerator_of
from penguin_edge.training.progress import Log, TrainProgress, forward_flops, measure_peak, shown, training_flops
from penguin_edge.training.schedule import cosine_with_min_lr, freeze, optimizers, parameter_groups, with_muon
from penguin_edge.training.state import (
    BASE,
    COUNTS,
    RESULT,
    STATE,
    TEACHER,
    TrainingState,
    check_room,
    checkpoints,
    cut_log,
    load_extra,
    load_optimizer_state,
    optimizer_state,
    read_state,
    regular,
    save_result,
    save_step,
)
from penguin_edge.training.train_config import STAGES, TrainConfig
from penguin_edge.training.trainee import (
    MEANS,
    Trainee,
    add_lora,
    is_adapter,
    named_tensors,
    published_model,
    shard,
    whole,
)


def train(config: TrainConfig, say: Callable[[str], None]) -> dict[str, Any] | None:
    """Run one stage and leave `OUT/model`.

    Args:
        say: receives lines for the reader.
    Returns:
        What happened, as JSON values; None in every process but the first.
    Raises:
        PenguinError: see the children; a checkpoint written before stays valid.
    """
    return Trainer(config, say).run()


class Trainer:
    """One run, as one process of it sees it."""

    def __init__(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        self.config = config
        if config.threads:
            torch.set_num_threads(config.threads)
        self.accelerator = accelerator_of(config)
        self.device: torch.device = self.accelerator.device
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.main: bool = self.accelerator.is_main_process
        self.say = say if self.main else (lambda line: None)
        self._check_out()
        self.checkpoint = Checkpoint.open(
            config.model,
            random_weights=config.random_weights,
            seed=config.seed,
            note=lambda line: self.say(f"note: {line}"),
        )
        self.shape = self.checkpoint.config
        if self.shape.vision is None:
            raise CheckpointError(f"{config.model}: reads text only; training needs a model with an encoder")
        self.rates = config.rates or STAGES[config.stage].rates
        self.distill = STAGES[config.stage].distill if config.distill is None else config.distill
        if self.distill and config.teacher is None:
            raise InputError(
                f"stage {config.stage} distills from a teacher; name one with --teacher, or use --no-distill"
            )
        if self.distill and self.rates.distill is None:
            raise InputError("the adapter to the teacher has no learning rate; give it one with --distill-lr")
        if config.lora is not None and self.rates.llm is None:
            raise InputError("LoRA adapts the language model, which is frozen here; give it a learning rate")
        self.corpus = Corpus.read(config.data, config.media_root, allow_outside=config.allow_outside)
        options = config.options or STAGES[config.stage].data
        limit = min(options.model_max_length, self.shape.text.max_position_embeddings)
        self.options = dataclasses.replace(options, model_max_length=limit)
        self.builder = SampleBuilder(self.shape, Tokenizer.of(self.checkpoint), self.options)
        lengths = self._lengths() if config.length_group else None
        self.order = Order(
            self.corpus.sizes,
            config.batch_size,
            config.seed,
            self.corpus.weights,
            self.world,
            config.accumulate,
            lengths,
            config.length_jitter,
        )
        self.total = config.max_steps or math.ceil(config.epochs * self.order.steps_per_epoch)
        self.epochs = self.total / self.order.steps_per_epoch
        self.counts = dict.fromkeys(COUNTS, 0)

    def _check_out(self) -> None:
        out = self.config.out
        if out.exists() and not out.is_dir():
            raise InputError(f"{out} is a file; name a folder for --out")
        if not self.config.resume and out.is_dir() and any(out.iterdir()):
            raise InputError(f"{out} is not empty; continue that run with --resume, or choose another folder")

    def _lengths(self) -> tuple[int, ...]:
        """Tokens of every record; measured by one process."""
        lengths: tuple[int, ...] = ()
        if self.main:
            lengths = measured_lengths(self.corpus, self.builder, self.config.workers, self.say)
        if self.world > 1:
            from accelerate.utils import broadcast_object_list

            (lengths,) = broadcast_object_list([lengths])
        return lengths

    def run(self) -> dict[str, Any] | None:
        """All steps that are left, the checkpoints, and the result.

        Raises:
            CheckpointError: another run works in the folder.
        """
        self.accelerator.wait_for_everyone()  # all have looked at the folder before it is made
        if not self.main:
            return self._run()
        with held(self.config.out, CheckpointError):
            self._check_out()  # once more, where no other run can begin
            return self._run()

    def _run(self) -> dict[str, Any] | None:
        config = self.config
        begin, state = self._start()
        trainee = self._trainee(state)
        self._prepare(trainee, state)
        self.say(self._headline())
        peak = config.peak_flops or measure_peak(
            self.device, torch.bfloat16 if config.precision == "bf16" else torch.float32
        )
        self.say(
            f"MFU: operations of matrix products and attention, recomputation left out, against {peak / 1e9:,.0f} "
            f"GFLOP/s per process ({'given' if config.peak_flops else 'measured: one large matrix product'})"
        )
        progress = TrainProgress(begin, self.total, peak * self.world)
        micro = Micro(self.corpus.records, self.builder, self.shape.pad_token_id, self._dummies())
        run = Run(self.order, self.rank, begin, self.total)
        feed = deliveries(micro, run, config.workers, config.prefetch)
        planned = steps_of(self.order, begin, self.total)
        with contextlib.ExitStack() as stack:
            stack.callback(progress.close)
            if config.resume and self.main:
                cut_log(config.out, begin)
            log = Log(config.out, config.tensorboard, begin, stack) if self.main else None
            for step in range(begin, self.total):
                batches = [next(feed) for _ in range(config.accumulate)]
                line, flops = self._step(step, batches)
                self._report(batches, progress)
                self._refuse_bad_data()
                if log is not None:
                    log.write({**line, "ids": self._ids_hash(next(planned))})
                    progress.update(step + 1, line["tokens"], flops, shown(line))
                if (step + 1) % config.save_every == 0 or step + 1 == self.total:
                    self._save(step + 1)
        self._save_result()
        self.accelerator.end_training()
        if not self.main:
            return None
        return {"model": str(config.out / RESULT), "steps": self.total, **self.counts, **progress.summary()}

    def _start(self) -> tuple[int, TrainingState | None]:
        """Steps already taken, and the state to resume from."""
        config = self.config
        if config.resume and self.main:
            clear_all(config.out, CheckpointError)
        self.accelerator.wait_for_everyone()
        found = checkpoints(config.out) if config.resume else []
        state = None
        if found:
            self.resumed = found[-1]
            state = read_state(self.resumed, self.identity(), self.say)
        begin = state.step if state else 0
        # Before the log is touched: a run that is refused leaves everything as it was.
        check_room(config.out, begin, self.total)
        if state:
            self.say(f"resuming from {self.resumed}: step {begin} of {self.total}")
        elif config.resume:
            self.say(f"{config.out}: no checkpoint there yet; starting from the beginning")
        return begin, state

    def _trainee(self, state: TrainingState | None) -> Trainee:
        """The model with the weights to begin with, what is frozen, and the teacher."""
        config = self.config
        source = self.checkpoint
        if state is not None:
            source = Checkpoint.open(self.resumed, note=lambda line: None)
        penguin = self._weights(source)
        if config.lora is not None:
            if state is not None:  # the checkpoint has its adapters merged
                base = self._weights(self.checkpoint)
                penguin.embedding, penguin.decoder = base.embedding, base.decoder
            # Its factors begin with random numbers, the same in every process.
            torch.manual_seed(stable_seed(config.seed, "lora"))
            add_lora(penguin, config.lora)
        distiller = self._distiller() if self.distill else None
        trainee = Trainee(
            penguin, scope=config.scope, backend=config.attention, precision=config.precision, distiller=distiller
        )
        named = dict(named_tensors(trainee))
        freeze(named.items(), self.rates)
        if config.lora is not None:
            for name, parameter in named.items():
                if name.startswith(("decoder.", "embedding.")):
                    parameter.requires_grad_(is_adapter(name))
        if state is not None:
            load_extra(named, state, self.resumed / STATE)
        if config.gradient_checkpointing:
            checkpoint_blocks(penguin)
        return trainee.train()

    def _weights(self, source: Checkpoint) -> PenguinModel:
        """A model in fp32; one without stored weights is drawn anew, with weights made to learn."""
        penguin = source.load(dtype=torch.float32)
        if source.stored is None:
            initialise(penguin, self.config.seed)
        return penguin

    def _distiller(self) -> Distiller:
        config, vision = self.config, self.shape.vision
        assert config.teacher is not None and vision is not None
        torch.manual_seed(stable_seed(config.seed, "distill"))
        _, teacher = read_encoder(config.teacher)
        return Distiller(
            teacher, vision.hidden_size, config.distill_form, weight=config.distill_weight, epochs=self.epochs
        )

    def _dummies(self) -> bool:
        """Whether each sample without images brings a dummy patch, as the reference's distillation has it."""
        return self.distill and self.config.distill_form == "reference"

    def _prepare(self, trainee: Trainee, state: TrainingState | None) -> None:
        """Wrap for the processes at hand, and make the optimiser."""
        config = self.config
        if config.precision == "bf16":
            torch.set_float32_matmul_precision("high")  # TF32 where fp32 is left, as in the recipe
            # Norms with fp32 weights on bf16 activations are what autocast means.
            warnings.filterwarnings("ignore", message="Mismatch dtype between input and weight")
        trainee.to(self.device)
        self.model: nn.Module = trainee
        if config.fsdp:
            shard(trainee)
        elif self.world > 1:
            self.model = self.accelerator.prepare_model(trainee)
        named = dict(named_tensors(self.model))
        self.groups = parameter_groups(named.items(), self.rates, config.weight_decay, config.grouping)
        self.trainable = [named[name] for group in self.groups for name in group.names]
        self.parameter_count = sum(parameter.numel() for parameter in named.values())
        if config.muon_lr is not None:
            self.groups = with_muon(self.groups, config.muon_lr)
        self.optimizers = optimizers(self.groups, named, config.betas, config.eps)
        names = {id(parameter): name for name, parameter in named.items()}
        self.name_of: Callable[[Tensor], str] = lambda parameter: names[id(parameter)]
        if state is not None:
            load_optimizer_state(self.optimizers, self.name_of, state, self.resumed / STATE)
            self.counts = state.counts

    def _headline(self) -> str:
        trainable = sum(parameter.numel() for parameter in self.trainable)
        processes = f"{self.world} processes" if self.world > 1 else "1 process"
        return (
            f"stage {self.config.stage} ({STAGES[self.config.stage].name}): {len(self.corpus.records)} records, "
            f"{self.total} steps of {self.order.step_size} samples, {trainable:,} of {self.parameter_count:,} "
            f"parameters learn, {self.device.type} {self.config.precision}, {processes}"
        )

    def _step(self, step: int, batches: Sequence[Delivery]) -> tuple[dict[str, Any], float]:
        """One optimiser step; its line of the log, and the operations it took."""
        config = self.config
        factor = cosine_with_min_lr(
            step,
            warmup_steps=math.ceil(config.warmup_ratio * self.total),
            total_steps=self.total,
            min_lr_ratio=config.min_lr_ratio,
            warmup_lr_ratio=config.warmup_lr_ratio,
        )
        options = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, spec in zip(options, self.groups, strict=True):
            group["lr"] = spec.learning_rate * factor
        totals = self._totals(batches)
        torch.manual_seed(stable_seed(config.seed, "step", step, self.rank))
        parts = self._backward(step, batches, totals)
        norm = whole(torch.nn.utils.clip_grad_norm_(self.trainable, config.max_grad_norm)).item()
        loss = parts.pop("loss")
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._refuse_nonfinite(step, loss, norm, batches)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        for key in COUNTS:
            self.counts[key] += int(totals[key])
        line = {
            "step": step + 1,
            "epoch": (step + 1) / self.order.steps_per_epoch,
            "loss": loss,
            "lr": {g.part + " muon" * g.muon: g.learning_rate * factor for g in self.groups},
            "parts": parts,
            "grad_norm": norm,
            **{key: int(totals[key]) for key in COUNTS},
        }
        learning = {group.part for group in self.groups}
        flops = training_flops(
            totals["encoder_flops"],
            totals["decoder_flops"],
            encoder_learns=bool(learning & {"encoder", "patch_embedding"}),
            projector_learns="projector" in learning,
            llm_learns="llm" in learning,
        )
        return line, flops

    def _totals(self, batches: Sequence[Delivery]) -> dict[str, float]:
        """Counts of one step over all micro-batches and processes."""
        used = [delivery.batch for delivery in batches if delivery.samples]
        flops = [forward_flops(self.shape, batch) for batch in used]
        counts: dict[str, float] = {
            "samples": sum(delivery.samples for delivery in batches),
            "tokens": sum(sum(batch.lengths) for batch in used),
            "visual_tokens": sum(len(batch.visual_order) for batch in used),
            "targets": sum(len(batch.targets) for batch in used),
            "bad": sum(len(delivery.bad) for delivery in batches),
            "too_long": sum(len(delivery.too_long) for delivery in batches),
            "items": sum(count_items(batch, self.config.scope) for batch in used),
            "encoder_flops": sum(encoder for encoder, _ in flops),
            "decoder_flops": sum(decoder for _, decoder in flops),
        }
        if self.world > 1:
            values = torch.tensor(list(counts.values()), dtype=torch.float64, device=self.device)
            counts = dict(zip(counts, self.accelerator.reduce(values).tolist(), strict=True))
        return counts

    def _backward(self, step: int, batches: Sequence[Delivery], totals: dict[str, float]) -> dict[str, float]:
        """Gradients of one step; the loss and its parts over all micro-batches and processes."""
        items = max(totals["items"], 1)
        reference = self._dummies()
        distill_items = items if reference else max(totals["visual_tokens"], 1)
        epoch = step / self.order.steps_per_epoch
        sums: dict[str, Tensor] = {}
        for number, delivery in enumerate(batches):
            with self._gradient_sync(number == len(batches) - 1):
                parts = self.model(delivery.batch.to(self.device), items, distill_items, epoch)
                # Gradients are averaged over processes; the loss is divided by the items of all of them already.
                (parts["loss"] * self.world).backward()
            share = len(delivery.batch.visual_order) / max(totals["visual_tokens"], 1)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value.detach() * (share if name in MEANS else 1.0)
        stacked = torch.stack(list(sums.values()))
        if self.world > 1:
            stacked = self.accelerator.reduce(stacked)
        return dict(zip(sums, stacked.tolist(), strict=True))

    def _gradient_sync(self, on: bool) -> contextlib.AbstractContextManager[Any]:
        """Processes exchange gradients once per step."""
        if isinstance(self.model, FSDPModule):
            self.model.set_requires_gradient_sync(on)
        elif not on:
            return self.accelerator.no_sync(self.model)
        return contextlib.nullcontext()

    def _refuse_nonfinite(self, step: int, loss: float, norm: float, batches: Sequence[Delivery]) -> None:
        ids = [id_ for delivery in batches if delivery.samples for id_ in delivery.batch.ids]
        if self.world > 1:
            from accelerate.utils import gather_object

            ids = gather_object(ids)
        path = regular(self.config.out / f"nonfinite-step-{step + 1}.json")
        if self.main:
            data = {"step": step + 1, "loss": repr(loss), "grad_norm": repr(norm), "ids": ids}
            write_json(path, data)
        raise NonFiniteLoss(
            f"the loss of step {step + 1} is {loss} and its gradient norm {norm}; the ids of its {len(ids)} records "
            f"are in {path}: look at them, or lower the learning rate and resume from the last checkpoint"
        )

    def _report(self, batches: Sequence[Delivery], progress: TrainProgress) -> None:
        for delivery in batches:
            for reason in delivery.bad + delivery.too_long:
                progress.close()
                print(f"left out: {reason}", file=sys.stderr, flush=True)

    def _refuse_bad_data(self) -> None:
        counts, share = self.counts, self.config.max_bad_share
        left_out = counts["bad"] + counts["too_long"]
        seen = counts["samples"] + left_out
        if seen >= min(100, self.order.samples_per_epoch) and left_out > share * seen:
            raise InputError(
                f"{left_out} of {seen} samples cannot be used ({counts['bad']} unreadable, {counts['too_long']} too "
                f"long), more than a share of {share}; repair the data, or raise --max-bad-share"
            )

    def _ids_hash(self, step: Sequence[int]) -> str:
        """Which records a step was to use, whatever their order."""
        ids = sorted(self.corpus.records[index].id for index in step)
        return hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]

    def _save(self, step: int) -> None:
        config = self.config
        model, extra = published_model(self.model, self.shape, config.lora)
        optimizer = optimizer_state(self.optimizers, self.name_of)
        if self.main:
            save_step(
                config.out,
                model,
                self.checkpoint.tokenizer,
                TrainingState(step, self.identity(), dict(self.counts), optimizer, extra),
                keep=config.keep,
                max_shard_bytes=config.max_shard_bytes,
            )
        self.accelerator.wait_for_everyone()

    def _save_result(self) -> None:
        """The published form in the dtype of the model that training began with."""
        config = self.config
        model, extra = published_model(self.model, self.shape, config.lora)
        if self.main and not (config.out / RESULT).exists():
            model = model.to(self.checkpoint.dtype)
            adapter = (extra, config.lora, self.checkpoint.source) if config.lora else None
            save_result(
                config.out, model, self.checkpoint.tokenizer, adapter=adapter, max_shard_bytes=config.max_shard_bytes
            )
        self.accelerator.wait_for_everyone()

    def identity(self) -> dict[str, Any]:
        """What decides the course of a run; a checkpoint of a run with another identity is refused."""
        config = self.config
        identity = {
            "stage": config.stage,
            "shape": self.shape.to_json(),
            "data": self.corpus.fingerprint(),
            "data options": dataclasses.asdict(self.options),
            "seed": config.seed,
            "steps": self.total,
            "batch size, accumulation and processes": [config.batch_size, config.accumulate, self.world],
            "length grouping": [config.length_group, config.length_jitter],
            "learning rates": dataclasses.asdict(self.rates),
            "schedule": [config.warmup_ratio, config.warmup_lr_ratio, config.min_lr_ratio],
            "optimiser": [config.weight_decay, *config.betas, config.eps, config.max_grad_norm, config.grouping],
            "Muon": config.muon_lr,
            "loss scope": config.scope,
            "precision": config.precision,
            "distillation": [config.distill_form, config.distill_weight, str(config.teacher)] if self.distill else None,
            "LoRA": None if config.lora is None else {**dataclasses.asdict(config.lora), "base": config.model},
            **self._sources,
        }
        return dict(json.loads(json.dumps(identity)))

    @functools.cached_property
    def _sources(self) -> dict[str, str | None]:
        """Hashes, made once, of the files of weights that a step does not hold, and that the run needs all the same."""
        config = self.config
        return {
            BASE: None if config.lora is None else self.checkpoint.fingerprint(),
            TEACHER: encoder_fingerprint(config.teacher) if self.distill and config.teacher is not None else None,
        }
