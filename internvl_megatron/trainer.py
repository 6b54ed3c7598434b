"""The training loop. Read this first: `Trainer` builds a run in the order written, `run` is the whole loop."""

import logging
import os
import signal
import socket
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from internvl_megatron.checkpoint import adapter_base, folders, save_load, weights
from internvl_megatron.checkpoint.optimizer_layout import optimizer_layout
from internvl_megatron.checkpoint.saver import Saver
from internvl_megatron.config.overrides import CONFIG_FILE, changed_fields, from_json, to_json
from internvl_megatron.config.plan import plan
from internvl_megatron.config.schema import RunConfig
from internvl_megatron.device import Device, open_device
from internvl_megatron.errors import ConfigError, TrainingError
from internvl_megatron.faults.stop_signals import StopSignals
from internvl_megatron.faults.watchdog import Watchdog
from internvl_megatron.live_benchmarks import LiveBenchmarks
from internvl_megatron.logs import configure_logging
from internvl_megatron.model.build import build_model, check_copies_agree, torch_dtype
from internvl_megatron.parallel.groups import make_groups
from internvl_megatron.parallel.host import gather_texts, sum_floats
from internvl_megatron.preference_run import PreferenceRun
from internvl_megatron.ranks import RankInfo, joined
from internvl_megatron.recipe_report import encoder_schedule
from internvl_megatron.run_data import RunData
from internvl_megatron.scaling.counts import parameter_counts
from internvl_megatron.train.bad_steps import BadStep
from internvl_megatron.train.objective import Outcome
from internvl_megatron.train.step import Step, StepResult
from internvl_megatron.train.stragglers import find_stragglers, gather_work
from internvl_megatron.watching.boards import check_wandb
from internvl_megatron.watching.metrics import RunSummary
from internvl_megatron.watching.reporting import Reporting
from internvl_megatron.watching.run_events import RunEvents

log = logging.getLogger(__name__)

FIXED_SETTINGS = (
    "rows_per_step", "ramp.start_rows", "ramp.increment_rows", "ramp.ramp_steps", "seed", "data.seed",
    "data.group_weights", "optimizer.name", "dtype", "optimizer.vision.trainable", "optimizer.projector.trainable",
    "optimizer.language.trainable", "lora.language_rank", "lora.vision_rank", "lora.scale", "lora.layers", "loss.kind",
    "mpo.beta",
)  # fmt: skip
"""Settings besides the model's that a run keeps for life: its data order and its optimizer state depend on them."""


MOST_STRAGGLERS_TOLD = 8
"""In a line of the log; metrics have all."""


def train_rank(info: RankInfo, config: RunConfig) -> RunSummary:
    """Body of one rank: join the world, build the run, train."""
    configure_logging(info.rank)
    tqdm.set_lock(threading.RLock())  # its default lock is shared between processes and would outlive a killed rank
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // info.local_world_size))
    device = open_device(config.device, info.local_rank)
    with joined(info, device, config.parallel.collective_timeout_seconds):
        trainer = Trainer(info, config, device)
        try:
            summary = trainer.run()
        except BaseException:
            trainer.close(waits=False)  # what failed is told at once: the others wait for it
            raise
        trainer.close()
        return summary


class Trainer:
    """One rank of a run."""

    def __init__(self, info: RankInfo, config: RunConfig, device: Device) -> None:
        self.config = config
        self.plan = plan(config, info.world_size)
        self.device = device
        log.info(
            "%s: %.1fM parameters, %s, %d rows a step and replica, layers by stage %s, vocabulary padded to %d",
            config.name,
            parameter_counts(config.model).total / 1e6,
            self.plan.layout,
            self.plan.rows_per_replica,
            ",".join(map(str, self.plan.stage_layers)),
            self.plan.padded_vocab_size,
        )
        log.info("%s", encoder_schedule(config, self.plan))
        if (queues := device.hardware_queues(config.parallel)) is not None:
            log.info("%s", queues)
        check_wandb(config.wandb_project)
        self.root = _writable(Path(config.folder))
        self.watchdog = Watchdog(info, self.root, config.watchdog)
        self.is_main = info.rank == 0
        self.groups = make_groups(
            self.plan.layout, device, config.parallel.collective_timeout_seconds, self.plan.vision_layout
        )
        self.saver = Saver(self.root / folders.CHECKPOINTS, config.checkpoint, self.groups)
        newest = self.saver.newest(config.checkpoint.verify == "contents")
        if newest is not None:
            self.saver.copy(newest)
        starts_fresh = newest is None and config.checkpoint.load is None
        self.benchmarks = LiveBenchmarks(config, self.groups, device)
        self.model = build_model(config, self.groups, device, initialize=starts_fresh)
        self.trainer_step = Step(config, self.model, self.groups, device)
        self.trainer_step.clock.on_progress = self._progress
        self.preference = PreferenceRun(config, self.trainer_step)
        self.data = RunData(config, self.plan, self.groups, self.preference.file)
        self.step = 0
        self.num_tokens = 0
        self.num_samples = 0
        self.num_rewound_steps = 0
        self.events = RunEvents(self.root) if self.is_main else None
        self._base: adapter_base.Base | None = None
        self._resume(newest)
        check_copies_agree(self.model, self.groups)
        self._write_config()
        peak_flops = self._peak_flops()
        self.reporting = Reporting(config, self.plan, device, peak_flops, self.step) if self.is_main else None
        self.signals = StopSignals()

    def run(self) -> RunSummary:
        """Train until the last step, or until some rank is asked to stop; a checkpoint ends both."""
        config, loss, held_out, interrupted = self.config, None, None, False
        checkpoint = config.checkpoint
        while self.step < config.num_steps and not interrupted:
            start = time.perf_counter()
            self.watchdog.step = self.step
            self.watchdog.beat("rows")
            batch = self.data.loader.next_step()
            following = self.data.loader.peek() if self.step + 1 < config.num_steps else None
            skipped = sum(self.data.loader.skipped().values()) if self.data.is_leader else 0
            stops = self.signals.received is not None
            result = self.trainer_step.run(batch, self.step, following, skipped, stops)
            self._poll_saver()
            seconds = time.perf_counter() - start
            self.step += 1
            self.num_tokens += result.agreement.num_tokens
            self.num_samples += result.agreement.num_samples
            self.watchdog.has_started()
            loss, interrupted = result.loss, result.stop_requested
            held_out = self._evaluate() if self._due(config.eval_every_steps) else None
            scores = self._score_benchmarks() if self._due(config.benchmarks.every_steps) else {}
            slow = self._stragglers(result, seconds) if self._is_shown(held_out) else {}
            if self.reporting is not None:
                counts = self._counts() | {"stragglers": slow, "benchmark_scores": scores}
                self.reporting.report(self.step, result, seconds, held_out, counts)
                self.reporting.show_samples(self.step, batch, self.data.settings, self.data.tokenizer)
            self._check_gradients(result)
            if result.bad is not None and self._react(result.bad):
                continue
            is_due = any(map(self._due, (checkpoint.save_every_steps, checkpoint.milestone_every_steps)))
            if interrupted or is_due or self.step == config.num_steps:
                self._save()
        self._finish_saving()
        if not interrupted:  # whoever stops a run may not wait so long; the next start makes the copy
            self.watchdog.beat("copying", checkpoint.max_wait_seconds)
            self.saver.wait_for_mirror()
            self._note_failed_saves()
        stop_signal = (self.signals.received or signal.SIGTERM) if interrupted else None
        return RunSummary(self.step, loss, None if held_out is None else held_out.loss, stop_signal)

    def close(self, waits: bool = True) -> None:
        """End threads, or leave them to the end of the process, and close the metrics files."""
        self.watchdog.beat("ending")
        self.saver.close()
        if waits:
            self.data.loader.close()
        if self.reporting is not None:
            self.reporting.close()
        self.watchdog.close()

    def _progress(self, phase: str) -> None:
        self.watchdog.beat(phase or "evaluation")

    def _due(self, every: int | None) -> bool:
        return every is not None and (self.step % every == 0 or self.step == self.config.num_steps)

    def _evaluate(self) -> Outcome | None:
        return None if self.data.eval_rows is None else self.trainer_step.judge(self.data.eval_rows)

    def _score_benchmarks(self) -> dict[str, float]:
        def beat() -> None:  # behind its last answer a replica waits for the others
            self.watchdog.beat("benchmarks", self.config.parallel.collective_timeout_seconds)

        beat()
        self.trainer_step.gather_parameters()
        return self.benchmarks.scores(self.model, self.step, beat)

    def _resume(self, newest: Path | None) -> None:
        """Continue from the newest checkpoint of this run, or start from the weights the configuration names."""
        if newest is not None:
            self._check_same_run()
        needs_first_weights = self.model.has_adapters or self.preference.needs_first_weights
        if self.config.checkpoint.load is not None and (needs_first_weights or newest is None):
            self._load_weights(Path(self.config.checkpoint.load))
        if needs_first_weights or newest is None:
            self.preference.set_reference()
        if newest is not None:
            own_layout = optimizer_layout(self.config, self.groups)
            info, positions = save_load.load(
                newest, self.model, self.trainer_step.optimizer, self.groups, self._base, own_layout
            )
            self.num_rewound_steps = info.num_rewound_steps
            self.data.loader.load_state_dict(positions, info.step + info.num_rewound_steps)
            judge = self.trainer_step.bad_steps
            judge.num_bad, judge.num_rewinds = info.num_bad_steps, info.num_rewinds
            self._continue_from(info)
            log.info("continuing from %s (step %d, written as %s)", newest, info.step, info.layout)
        elif self.config.checkpoint.load is not None:
            if self.is_main:
                weights.copy_companions(Path(self.config.checkpoint.load), self.root)
            log.info("starting from the weights of %s", self.config.checkpoint.load)

    def _continue_from(self, info: folders.CheckpointInfo) -> None:
        """Take over what a checkpoint says of the steps before it."""
        self.step, self.num_tokens, self.num_samples = info.step, info.num_tokens, info.num_samples
        self.preference.continue_from(info)
        self.trainer_step.bad_steps.continue_from(info.recent_losses)

    def _check_gradients(self, result: StepResult) -> None:
        """End the run if a step computed twice gave two results.

        Raises:
            TrainingError: on all ranks; names those that differ.
        """
        if result.differing_ranks:
            hosts = gather_texts(socket.gethostname(), self.groups.host_world)
            which = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in result.differing_ranks)
            text = f"step {self.step}: {which} computed other gradients the second time"
            self._note("corruption", text)
            raise TrainingError(
                f"{text}: look at the machine, or leave it out (sbatch --exclude={hosts[result.differing_ranks[0]]} JOB); the run "
                "continues from its newest checkpoint. If ranks only compute in another order each time, as some GPU kernels do, "
                "set bad_steps.recheck_every_steps=null"
            )

    def _react(self, bad: BadStep) -> bool:
        """Do what the configuration says after a bad step, which has changed nothing; whether the run has gone back.

        Raises:
            TrainingError: the run is to stop, or cannot go back.
        """
        self._note(f"{bad.kind} {bad.action}", bad.reason)
        if bad.action == "skip":
            return False
        if bad.action == "stop":
            self._save()
            self._finish_saving()
            raise TrainingError(
                f"step {self.step} is bad and ends the run: {bad.reason}. It has saved; the same command goes on after this "
                "step's data. bad_steps.* says what happens to such steps"
            )
        self.watchdog.beat("going back", self.config.checkpoint.max_wait_seconds + self.config.watchdog.start_seconds)
        self.saver.wait()
        newest = self.saver.newest(contents=True)
        if newest is None:
            raise TrainingError(
                f"step {self.step} is bad ({bad.reason}), and there is no checkpoint yet to go back to: set "
                "checkpoint.save_every_steps, or bad_steps.on_nonfinite=skip"
            )
        own_layout = optimizer_layout(self.config, self.groups)
        info, _ = save_load.load(newest, self.model, self.trainer_step.optimizer, self.groups, self._base, own_layout)
        self.num_rewound_steps += self.step - info.step
        self._note("rewound", f"to {newest.name}; data of {self.step - info.step} steps are passed over")
        self._continue_from(info)
        if self.reporting is not None:
            self.reporting.go_back(self.step)
        return True

    def _note(self, event: str, text: str) -> None:
        if self.events is not None:
            log.warning("step %d: %s: %s", self.step, event, text)
            self.events.write(self.step, event, text)

    def _load_weights(self, source: Path) -> None:
        """Load the weights to start from, or that adapters or rewards of pairs belong to."""
        if self.model.has_adapters:
            adapter_base.refuse_adapters(source)
        found = save_load.load_weights(source, self.config.model, self.model, self.groups)
        self.trainer_step.optimizer.reload_parameters()
        if self.model.has_adapters:
            self._base = save_load.base_of(found, self.config.dtype, self.model, self.groups)

    def _check_same_run(self) -> None:
        """A run can change its layout and its length, but not its model or its data."""
        before = from_json(self.root / CONFIG_FILE)
        changed = changed_fields(before, self.config)
        refused = [name for name in changed if name.startswith("model.") or name in FIXED_SETTINGS]
        if refused:
            raise ConfigError(
                f"{self.root} holds a run with other settings of {', '.join(refused)}: set them back, or choose another "
                "folder (folder=...) and start from its weights (checkpoint.load=...)"
            )
        if changed:
            log.info("continuing with changed settings: %s", ", ".join(changed))

    def _write_config(self) -> None:
        if self.is_main:
            temporary = self.root / f"{CONFIG_FILE}.writing"
            temporary.write_text(to_json(self.config) + "\n")
            temporary.replace(self.root / CONFIG_FILE)

    def _save(self) -> None:
        """Begin to save."""
        config = self.config
        checkpoint, milestone = config.checkpoint, config.checkpoint.milestone_every_steps
        self.watchdog.beat("saving", 2 * checkpoint.max_wait_seconds)  # for the save before, and for this one
        is_milestone = milestone is not None and self.step % milestone == 0
        fits_all = is_milestone or self.step == config.num_steps or checkpoint.optimizer_format == "layout_free"
        has_state = config.optimizer.name == "adamw"
        info = folders.CheckpointInfo(
            step=self.step,
            num_tokens=self.num_tokens,
            num_samples=self.num_samples,
            layout=str(self.plan.layout),
            optimizer_state=has_state,
            num_bad_steps=self.trainer_step.bad_steps.num_bad,
            num_rewinds=self.trainer_step.bad_steps.num_rewinds,
            num_rewound_steps=self.num_rewound_steps,
            recent_losses=self.trainer_step.bad_steps.recent_losses,
            optimizer_layout=None if fits_all or not has_state else optimizer_layout(config, self.groups),
            **self.preference.checkpoint_fields(),
        )
        self.trainer_step.gather_parameters()
        position: dict[str, Any] | None = self.data.loader.state_dict() if self.data.is_leader else None
        optimizer = self.trainer_step.optimizer
        self.saver.start(save_load.state_to_save(info, self.model, optimizer, self.groups, position, self._base))
        if not checkpoint.asynchronous:
            self.saver.wait()

    def _poll_saver(self) -> None:
        self.saver.poll()
        self._note_failed_saves()

    def _note_failed_saves(self) -> None:
        if self.events is not None:
            for failure in self.saver.failures:
                self.events.write(self.step, "save failed", failure)
            self.saver.failures.clear()

    def _finish_saving(self) -> None:
        """Wait for the run's last checkpoint, and try it once more if it failed.

        Raises:
            TrainingError: it failed again.
        """
        self.watchdog.beat("saving", self.config.checkpoint.max_wait_seconds)
        if self.saver.wait():
            return
        self._poll_saver()
        self._save()  # which gives this wait its time too
        is_saved = self.saver.wait()
        self._poll_saver()
        if not is_saved:
            raise TrainingError(
                f"{self.saver.root}: step {self.step}, the last, could not be saved, and the reason is above; mend it "
                "and run the same command again: it continues from the newest checkpoint"
            )

    def _counts(self) -> dict[str, Any]:
        """Fields of `StepMetrics` that are about more than the step."""
        bad_steps, saver, balance = self.trainer_step.bad_steps, self.saver, self.data.loader.balance
        counts: dict[str, Any] = {
            "total_tokens": self.num_tokens,
            "total_samples": self.num_samples,
            "num_bad_steps": bad_steps.num_bad,
            "num_rewinds": bad_steps.num_rewinds,
            "num_failed_saves": saver.num_failed,
            "save_blocked_seconds": saver.blocked_seconds,
        }
        if balance is not None:
            counts |= {"row_cost_imbalance": balance.after, "row_cost_imbalance_before": balance.before}
        return counts

    def _is_shown(self, held_out: Outcome | None) -> bool:
        """Whether the figures of the step are written down."""
        return held_out is not None or self._due(self.config.log_every_steps)

    def _stragglers(self, result: StepResult, seconds: float) -> dict[str, float]:
        """Slow ranks, as metrics have them; collective over all ranks."""
        factor, layout = self.config.watchdog.straggler_factor, self.plan.layout
        if factor is None or layout.world_size == 1:
            return {}
        stages = [layout.stage(rank) for rank in range(layout.world_size)]
        found = find_stragglers(gather_work(result.work, self.groups.host_world), stages, factor, seconds)
        if found and self.is_main:
            told = ", ".join(
                f"{slow.name} ({slow.factor:.1f} times its peers)" for slow in found[:MOST_STRAGGLERS_TOLD]
            )
            log.warning("step %d: slow: %s", self.step, told)
        return {slow.name: slow.factor for slow in found}

    def _peak_flops(self) -> float:
        """Peak of all ranks together, each measuring at the same time where it has to be measured."""
        dist.barrier(group=self.groups.host_world)
        mine = self.device.peak_flops(torch_dtype(self.config.dtype))
        return sum_floats([mine], self.groups.host_world)[0]


def _writable(folder: Path) -> Path:
    """The run's folder, made before anything expensive.

    Raises:
        ConfigError: it cannot be made or written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"folder={folder}: cannot be made ({error.strerror}); choose another (folder=PATH)"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"folder={folder}: is not writable; choose another (folder=PATH)")
    return folder
