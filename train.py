"""Trains a model as a recipe says; prepares a known data set by itself; prints a sample at the end.

    python train.py                                      the defaults below: a debug run of seconds, on any machine
    python train.py config/shakespeare_char.py           a recipe; on a CPU it takes the recipe's on_cpu values
    python train.py config/shakespeare_char.py --max_iters=100 --out_dir=out/short
    python train.py --resume --out_dir=out               goes on where a run stopped, to the same numbers
    python train.py config/shakespeare_char.py --resume=auto       the same; where nothing was saved, it starts
    torchrun --nproc_per_node=2 train.py config/shakespeare_char.py

Later values win: defaults, config files, --name=value. The out directory gets log.jsonl, run.json and the checkpoints
`last` and `best` (see checkpoint.py); an earlier run found there is moved into a folder earlier.N of its own.

Exit status: 0 finished; 2 an error that the one line explains; 75 stopped by --max_minutes or SIGUSR1, 130 by Ctrl-C,
143 by SIGTERM, all three with a save.
"""

import os
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from configurator import (
    UserError,
    check_ranges,
    check_shape,
    differences,
    flat_values,
    from_command_line,
    one_line_errors,
)


@dataclass(frozen=True)
class Vision:
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width
    patch_size: int = 8  # pixels of both sides of a patch


@dataclass(frozen=True)
class Rates:
    vision: float = 1.0  # the vision tower
    projector: float = 1.0  # from its vectors to the decoder's
    decoder: float = 1.0  # the language model

    def __post_init__(self):
        check_ranges(self, vision=0.0, projector=0.0, decoder=0.0)


@dataclass(frozen=True)
class Settings:
    # where
    task: Literal["text", "contrastive", "image-text"] = "text"  # what is trained, see tasks.py
    out_dir: str = "out"  # everything the run leaves
    dataset: str = "shakespeare_char"  # a name under data/, or a folder made by prepare.py
    init_from: str = "scratch"  # or a run's folder, gpt2, gpt2-medium, -large, -xl, a hub id, a published folder
    resume: Literal[False, True, "auto"] = False  # continue the run in out_dir, with its settings; auto: or start it
    # the model
    n_layer: int = 2  # blocks
    n_head: int = 2  # attention heads
    n_embd: int = 64  # width
    block_size: int = 64  # tokens of context
    dropout: float = 0.0  # share of activations dropped in training; pays when the data is seen many times
    bias: bool = False  # in linear layers and LayerNorms
    architecture: Literal["gpt", "gemma"] = "gpt"  # of the text task; the decoder of image-text is always a gemma
    mlp: Literal["gelu", "relu2"] = "gelu"  # a gpt's activation: GPT-2's, or the square of ReLU
    positions: Literal["learned", "rotary"] = "learned"  # of a gpt
    tied: bool = True  # the embedding matrix is also a gpt's output head
    bigrams: bool = False  # a gpt gets an embedding of each pair of neighbours too; for small vocabularies
    zero_init: bool = False  # a gpt's blocks start by adding nothing: what leads out of them is zero
    n_kv_head: int = 0  # key-value heads of a gemma; 0: n_head
    vision: Vision = Vision()  # the vision tower of the tasks with images
    init_vision: str = ""  # a contrastive run's folder, whose vision tower an image-text model starts with
    init_decoder: str = ""  # a text run's folder (architecture gemma), whose blocks its decoder starts with
    pair_loss: Literal["sigmoid", "softmax"] = "sigmoid"  # of the contrastive task: SigLIP's or CLIP's
    # the optimizer, with warm-up and decay
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: for the blocks' matrices, and AdamW for the rest
    batch_size: int = 16  # sequences per update, over all workers and micro-batches
    gradient_accumulation_steps: int = 1  # micro-batches per worker and update: less memory, the same numbers
    max_iters: int = 200  # updates
    learning_rate: float = 3e-3  # AdamW's at the peak
    muon_lr: float = 0.02  # Muon's at the peak; it falls in proportion
    lr_schedule: Literal["cosine", "linear"] = "cosine"  # the form of the decay
    min_lr: float = 3e-4  # at the end of the decay
    warmup_iters: int = 20  # updates to the peak
    lr_decay_iters: int = 0  # updates to min_lr; 0: max_iters
    weight_decay: float = 0.1  # of matrices and embeddings
    beta1: float = 0.9  # AdamW's memory of the gradient
    beta2: float = 0.99  # and of its square
    grad_clip: float = 1.0  # largest norm of the gradient; 0: no clipping
    lora_rank: int = 0  # fine-tune an image-text decoder by LoRA of this rank, see lora.py; 0: all its weights
    rates: Rates = Rates()  # multiples of the learning rate for the parts of an image-text model; 0 freezes the part
    # what it reports and saves
    eval_interval: int = 100  # updates between evaluations, each followed by a save
    eval_tokens: int = 2_000_000  # most tokens per evaluation; a shorter split is scored whole; 0: always whole
    log_interval: int = 10  # updates between lines of the log
    async_save: bool = True  # write checkpoints in the background; training waits for a copy in memory only
    max_minutes: float = 0.0  # stop after so long, with a save and exit status 75; 0: no limit
    max_grad_norm: float = 0.0  # stop if the gradient's norm, before clipping, exceeds it; 0: if it is no number
    max_loss_rise: float = 0.0  # stop if a loss exceeds its mean of 100 updates by so much; 0: if it is no number
    sample_tokens: int = 300  # length of the sample at the end; 0: none
    publish: str = ""  # a folder to write the best image-text model to at the end, in the published layout
    wandb: bool = False  # log to Weights & Biases too (pip install wandb; WANDB_MODE=offline needs no account)
    wandb_project: str = "quill"  # its project
    wandb_name: str = ""  # the run's name there; default: wandb's choice
    # the machine
    seed: int = 1337  # of weights, batches and dropout
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of the matrix products
    compile: Literal["auto", True, False] = "auto"  # torch.compile
    shard: bool = False  # spread weights, gradients and moments over torchrun's workers instead of copying them
    recompute: bool = False  # compute each block again in the backward pass instead of keeping its activations

    def __post_init__(self):
        check_ranges(self, batch_size=1, gradient_accumulation_steps=1, max_iters=1, learning_rate=0.0, min_lr=0.0,
                     muon_lr=0.0, warmup_iters=0, lr_decay_iters=0, weight_decay=0.0, grad_clip=0.0, eval_interval=1,
                     eval_tokens=0, log_interval=1, max_minutes=0.0, max_grad_norm=0.0, max_loss_rise=0.0,
                     sample_tokens=0, lora_rank=0, seed=0, n_layer=1, n_head=1, n_embd=1, n_kv_head=0, block_size=1,
                     dropout=0.0)
        check_shape(self.n_embd, self.n_head, self.n_kv_head, self.dropout)
        if os.path.isfile(self.out_dir):
            raise UserError(f"out_dir = {self.out_dir}: is a file; name a folder")
        workers = int(os.environ.get("WORLD_SIZE", 1))
        pieces = workers * self.gradient_accumulation_steps
        if self.batch_size % pieces:
            raise UserError(f"batch_size = {self.batch_size} does not divide into {pieces} micro-batches ({workers}"
                            f" workers x {self.gradient_accumulation_steps} accumulation steps)")
        if self.shard and (self.task == "contrastive" or self.dtype == "float16"):
            raise UserError("shard = True: not for --task=contrastive, whose single numbers can't be divided, nor for"
                            " --dtype=float16")
        if self.optimizer == "muon" and (self.shard or not self.learning_rate):
            raise UserError("optimizer = 'muon': not with --shard, for it needs whole matrices, nor with"
                            " --learning_rate=0")
        if self.publish and self.task != "image-text" or self.lora_rank and self.init_from == "scratch":
            raise UserError("--publish is for --task=image-text, and --lora_rank for one with --init_from")
        for name in ("mlp", "positions", "tied", "bigrams", "zero_init"):
            if getattr(self, name) != getattr(Settings, name) and (self.task, self.architecture) != ("text", "gpt"):
                raise UserError(f"{name} = {getattr(self, name)!r}: is for a text's gpt alone")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: must be at least 0 and below 1")


def has_accelerator(device):
    import device as devices  # torch is imported only if a recipe has on_cpu values
    return devices.has_accelerator(device)


def to_resume(out_dir, resume):
    """The complete checkpoints to go on from; none if the run is to start. Raises UserError if none can be right."""
    folders = []
    if resume and os.path.isdir(out_dir):
        import checkpoint
        from log import MOVING
        if not (Path(out_dir) / MOVING).exists():  # what is left beside it belongs to a run that was being set aside
            folders = checkpoint.present(out_dir, "last")
    if resume is True and not folders:
        raise UserError(f"there is nothing to resume in {out_dir}: no checkpoint; drop --resume to start")
    return folders


def readable_config(folders):
    """The config.json of the first checkpoint whose can be read; which one is intact is looked into later."""
    import checkpoint
    for folder in folders[:-1]:
        with suppress(UserError):
            return checkpoint.read_config(folder)
    return checkpoint.read_config(folders[-1])


def earlier_settings(given):
    """With --resume, the settings of the run that is being resumed."""
    if not given.get("resume"):
        return {}
    out_dir = given.get("out_dir", Settings.out_dir)
    folders = to_resume(out_dir, given["resume"])
    if not folders:
        return {}
    from prepare import BUILT_IN
    from tasks import GPT_SHAPE, SHAPE
    saved = readable_config(folders)["settings"]
    for name, value in flat_values(saved).items():
        fixed = name in ("task", "architecture", "dataset", *SHAPE, *GPT_SHAPE) or name.startswith("vision.")
        if fixed and given.get(name, value) != value and value != BUILT_IN:
            raise UserError(f"{name} = {given[name]!r}, but the run in {out_dir} has {value!r}: drop it to resume, or"
                            f" start a new run with --init_from={out_dir}")
    known = {field.name for field in fields(Settings)}
    return {name: value for name, value in saved.items() if name in known}


def check_data(settings):
    """Raises UserError for a data set that is unknown: before PyTorch is imported."""
    from prepare import check_dataset
    check_dataset(settings.dataset)


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, GIVEN = from_command_line(Settings, __doc__, has_accelerator, earlier_settings, check_data)

import dataclasses
import math
import signal
import time
from contextlib import nullcontext
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint as recomputed

import checkpoint
import distributed
from device import autocast, keep_freed_memory, peak_flops, peak_memory, pick_compile, pick_dtype
from health import Health
from log import Log, record_end, record_start, set_aside
from model import blocks
from optimizer import make_optimizer
from prepare import ensure
from tasks import TASKS


def learning_rate(update, settings):
    """The rate of the given update, counted from 1: linear warm-up, then half a cosine or a line down to min_lr."""
    s, last = settings, settings.lr_decay_iters or settings.max_iters
    if update <= s.warmup_iters:
        return s.learning_rate * update / (s.warmup_iters + 1)
    progress = min(1.0, (update - 1 - s.warmup_iters) / max(1, last - 1 - s.warmup_iters))
    left = 1 - progress if s.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return s.min_lr + left * (s.learning_rate - s.min_lr)


SPARE = 75  # exit status of a run that saved to be taken up again later: EX_TEMPFAIL, "try again"


class Stop:
    """Whether the loop is to end early: `status` is then the exit status, else 0.

    SIGINT and SIGTERM ask for it (a second one ends the process at once), SIGUSR1, which a cluster sends ahead of its
    SIGTERM, and the clock. Under torchrun no second one counts: it passes on what its workers may already have got,
    and ends them itself if they linger.
    """

    def __init__(self, world, minutes):
        self.asked, self.patient = 0, world.size > 1
        self.deadline = time.monotonic() + 60 * minutes if minutes else math.inf
        statuses = {"SIGINT": 130, "SIGTERM": 143, "SIGUSR1": SPARE}  # Windows has no SIGUSR1
        self.statuses = {getattr(signal, name): status for name, status in statuses.items() if hasattr(signal, name)}
        self.before = {number: signal.signal(number, self.note) for number in self.statuses}

    def note(self, number, frame):
        self.asked = self.asked or self.statuses[number]
        if not self.patient and self.statuses[number] != SPARE:
            self.restore()

    def restore(self):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    @property
    def status(self):
        return self.asked or (SPARE if time.monotonic() > self.deadline else 0)


def update(parallel, optimizer, scaler, batches, settings, dtype, device):
    """One step of the optimizer over all micro-batches: (this rank's mean loss, the gradient's norm), as tensors.

    batches: (arguments of the model, weight of their loss) of each micro-batch.
    """
    loss = torch.zeros((), device=device)
    for i, (batch, weight) in enumerate(batches, start=1):
        # Copies exchange gradients once, in the last backward; shards in each, as a rank has no room for all of them.
        last = i == settings.gradient_accumulation_steps
        wait = parallel.no_sync() if isinstance(parallel, DistributedDataParallel) and not last else nullcontext()
        with wait:  # around the forward pass too: DDP decides there
            with autocast(device, dtype):
                micro_loss = parallel(**batch) * weight
            scaler.scale(micro_loss).backward()
        loss += micro_loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(parallel.parameters(), settings.grad_clip or math.inf)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a sharded gradient
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss, norm


def train(settings, given, world):
    """The run: set up, then one loop. Returns (the task, the step reached, the exit status if it was stopped or 0)."""
    out_dir, device = Path(settings.out_dir), world.device
    folder = world.from_main(lambda: pick_up(out_dir, settings.resume))
    task = TASKS[settings.task](settings, given, device, folder)
    model, sharded = task.model, settings.shard and world.size > 1
    state = checkpoint.load_trainer(folder) if folder else {"step": 0, "best_val_loss": math.inf}
    step, best_val_loss = state["step"], state["best_val_loss"]
    dtype, why_dtype = pick_dtype(settings.dtype, device)
    compiled, why_compiled = pick_compile(settings.compile, device, settings.max_iters - step)
    prepare_model(model, sharded, compiled, dtype, settings, world)
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    if folder:
        restore(optimizer, scaler, state, folder)
    if world.is_main:
        print("settings: " + (", ".join(f"{k}={v!r}" for k, v in differences(settings).items()) or "the defaults"))
        print(f"device: {device}" + (f" x {world.size} workers" if world.size > 1 else "")
              + f"; dtype: {str(dtype)[6:]} ({why_dtype}); compile: {compiled} ({why_compiled})")
        print(task.describe(), flush=True)
        if not folder:
            set_aside(out_dir)
    parallel = model
    if world.size > 1 and not sharded:
        parallel = DistributedDataParallel(model, gradient_as_bucket_view=True)
    peak = peak_flops(device, dtype)
    log = Log(out_dir, settings, step, task.tokens_per_update, task.flops_per_update() / world.size, peak, world)
    if world.is_main:
        record_start(out_dir, settings, world, step=step, dtype=str(dtype)[6:], compile=compiled)
    health = Health(settings, task, step, scaler.is_enabled(), state.get("mean_loss"))
    stop, status = Stop(world, settings.max_minutes), 0

    def save(names, val_loss):
        if world.is_main or sharded:
            log.sync()
            info = {"settings": asdict(settings), "dataset": settings.dataset, "data": task.data_marks(), "step": step,
                    "val_loss": val_loss}
            state = {"step": step, "best_val_loss": best_val_loss, "mean_loss": health.mean,
                     "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            writer.save(names, model, task.tokenizer, info, state)

    model.train()
    with checkpoint.Writer(out_dir, settings.async_save, sharded) as writer:
        while step < settings.max_iters:
            lr = learning_rate(step + 1, settings)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            batches = task.micro_batches(step, world)
            loss, norm = update(parallel, optimizer, scaler, batches, settings, dtype, device)
            step += 1

            health.note(loss, norm)
            evaluating = step % settings.eval_interval == 0 or step == settings.max_iters
            logging = evaluating or step % settings.log_interval == 0 or step == 1
            if not (logging or health.due(step) or stop.status and world.size == 1):
                continue
            row = log.row(step, lr=lr, **health.look(world))
            status = world.max(stop.status) if step < settings.max_iters else 0
            names = ["last"] if evaluating or status else []
            if evaluating:
                row["val_loss"] = health.check(task.val_loss(world, dtype))
            if logging:
                log.write(row)
            if evaluating and row["val_loss"] < best_val_loss:
                best_val_loss, names = row["val_loss"], ["best", "last"]
            if names:
                save(names, row.get("val_loss"))
            if status:
                break
            if logging:
                log.restart(step)
            writer.check()
    log.close()
    stop.restore()
    if sharded and world.is_main and (settings.sample_tokens or settings.publish):
        task.model = checkpoint.load(checkpoint.find(out_dir, "last"), device)[0]
    return task, step, status


def prepare_model(model, sharded, compiled, dtype, settings, world):
    """Recomputation, compilation and sharding, as the settings and the device have it. Names of parameters stay."""
    for block in blocks(model) if sharded or settings.recompute else ():
        if compiled and sharded:
            block.forward = torch.compile(block.forward)  # what gathers the block's parameters stays outside
        if settings.recompute:
            block.forward = partial(recomputed, block.forward, use_reentrant=False)
    if sharded:
        distributed.shard(model, blocks(model), dtype, world)
    else:
        model.to(world.device)
        if compiled:
            model.compile()


def pick_up(out_dir, resume):
    """The checkpoint to go on from, or None to start."""
    if to_resume(out_dir, resume):
        for name in ("best", "last"):
            checkpoint.settle(out_dir, name)
    return checkpoint.first_intact(to_resume(out_dir, resume))


def restore(optimizer, scaler, state, folder):
    """Raises UserError if the optimizer in the checkpoint is that of other parameters."""
    try:
        checkpoint.load_optimizer(optimizer, state["optimizer"], folder)
    except ValueError:
        raise UserError(f"{folder / 'trainer.pt'} holds the optimizer of other parameters: resume with the --rates and"
                        " --lora_rank that the run had") from None
    scaler.load_state_dict(state["scaler"])


def main(settings, given):
    world = distributed.start(settings.device)
    keep_freed_memory()
    name = world.from_main(lambda: ensure(settings.dataset))
    began = time.perf_counter()
    task, step, stopped = train(dataclasses.replace(settings, dataset=name), given, world)
    if world.is_main:
        record_end(task.settings.out_dir, step, stopped)
        say_where(task, step, stopped, time.perf_counter() - began)
    world.close()
    if stopped:
        raise SystemExit(stopped)


def say_where(task, step, stopped, seconds):
    """The end of a run: a sample, where everything lies, what to run next."""
    out_dir = task.settings.out_dir
    if stopped:
        print(f"\nstopped at step {step} and saved; go on with: python train.py --resume --out_dir={out_dir}")
        return
    if task.settings.sample_tokens:
        print(f"\n{task.show()}\n")
    if task.settings.publish:
        task.publish(task.settings.publish)
        print(f"published in {task.settings.publish}")
    best = checkpoint.read_config(checkpoint.find(out_dir, "best"))
    print(f"{step} updates in {seconds:.0f} s, at most {peak_memory(task.device) / 2**20:,.0f} MiB;"
          f" best validation loss {best['val_loss']:.4f} at step {best['step']}")
    print(f"in {out_dir}: checkpoints best and last, log.jsonl, run.json\n"
          f"try it:      {task.command.format(out_dir=out_dir)}\n"
          f"evaluate it: python evaluate.py --out_dir={out_dir}")


if __name__ == "__main__":
    with one_line_errors(), distributed.others_explain():
        main(SETTINGS, GIVEN)
