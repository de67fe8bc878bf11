"""How fast this machine trains, samples and starts: one table on the terminal, the same as JSON in bench.json.

    python -m tools.bench                                      everything: some minutes on a GPU, ten on two CPU cores
    python -m tools.bench --only=train,sample --sizes=small    some of it, in a minute
    python -m tools.bench --only=against --ours="python sample.py --num_samples=10" --against="python their_sample.py"

Cases that are compared take turns: each runs once to warm up, then once per repeat. The table shows the median and the
range. Compare only figures of one run of this script, on a machine that does nothing else. If transformers is
installed, its models of the same shapes do the same work. Any other program is compared as a whole command.

On a GPU, "auto" measures other sizes (see AUTO). Many updates are made before anybody waits for one, so their time is
not the time to start one. "captured" are those that train.py replays as CUDA graphs. Beside a speed of generation,
"floor" is that speed if a step took only the time to read all weights once at the measured bandwidth, and no keys and
values. A model that fits into the GPU's cache may be faster.
"""

import os
from dataclasses import dataclass, replace
from typing import NamedTuple

from configurator import UserError, check_ranges, from_command_line, one_line_errors
from tools import shell_words

SECTIONS = ("peak", "start", "train", "sample", "vlm", "translate", "against")
AUTO = {  # {setting: (what "auto", or 0, stands for on a CPU, and on CUDA)}
    "only": (",".join(SECTIONS), "peak,train,sample,vlm,translate,against"),
    "sizes": ("small,full", "full,fast,124m"),
    "dtypes": ("float32,bfloat16", "bfloat16"),
    "batches": ("1,10,64", "1,10,256"),
    "repeats": (5, 3),
}


@dataclass(frozen=True)
class Settings:
    only: str = "auto"  # sections to measure, separated by commas; auto: all of them, without start on CUDA
    sizes: str = "auto"  # some of small, full, fast, 124m: see SHAPES; auto: small,full, on CUDA full,fast,124m
    dtypes: str = "auto"  # in training: of the matrix products; in sampling: of the whole model; on CUDA bfloat16
    batches: str = "auto"  # numbers of samples generated at once; auto: 1,10,64, on CUDA 1,10,256
    new_tokens: int = 250  # length of each sample, at most the context
    repeats: int = 0  # measured runs of each case; 0: 5, on CUDA 3
    compile: bool = False  # measure training and sampling with torch.compile too; that takes up to a minute per case
    transformers: bool = True  # compare with transformers if it is installed
    against: str = ""  # another program's command line, timed as a whole: start-up, work and exit
    ours: str = ""  # our command line for the same work
    threads: int = 0  # CPU threads; 0: PyTorch's choice
    device: str = "auto"  # auto, cpu, cuda, mps
    out: str = "bench.json"  # file for the table as JSON

    def __post_init__(self):
        check_ranges(self, new_tokens=1, repeats=0, threads=0)
        for name, known in (("only", SECTIONS), ("sizes", tuple(SHAPES)), ("dtypes", ("float32", "bfloat16"))):
            for word in getattr(self, name).split(","):
                if word not in known and getattr(self, name) != "auto":
                    raise UserError(f"{name} = {word}: must be some of {', '.join(known)}, separated by commas")
        if self.batches != "auto" and not all(word.isdecimal() and int(word) for word in self.batches.split(",")):
            raise UserError(f"batches = {self.batches}: must be whole numbers above 0, separated by commas")
        if os.path.isdir(self.out):
            raise UserError(f"out = {self.out}: is a folder; name a file")
        if not os.path.isdir(os.path.dirname(self.out) or "."):
            raise UserError(f"out = {self.out}: there is no folder {os.path.dirname(self.out)}; create it")
        if bool(self.against) != bool(self.ours):
            raise UserError("--against and --ours are two command lines that do the same work: give both or neither")
        for line in (self.against, self.ours):
            shell_words(line)  # raises UserError if a quote is not closed


    def on(self, device):
        """These settings, with what "auto" stands for on this device."""
        values = {name: choice[device.type == "cuda"] for name, choice in AUTO.items()}
        return replace(self, **{name: value for name, value in values.items() if getattr(self, name) in ("auto", 0)})


class Size(NamedTuple):
    shape: dict  # of the model: fields of GPTConfig
    batch_size: int  # in training
    dropout: float = 0.0  # in training
    updates: int = 20  # in each measured run on CUDA
    samples: int = 10**9  # the most to generate at once
    more: dict = {}  # settings of train.py


SHAPES = {
    # The models of config/shakespeare_char.py on a CPU and on a GPU.
    "small": Size(dict(n_layer=4, n_head=4, n_embd=128, block_size=64, vocab_size=65), 16),
    "full": Size(dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65), 64, 0.2),
    # That of config/shakespeare_char_fast.py on a GPU, with half the context. transformers has none like it.
    "fast": Size(dict(n_layer=6, n_head=4, n_embd=256, block_size=256, vocab_size=65, positions="rotary", mlp="relu2",
                      tied=False, bigrams=True), 16, 0.1, samples=0, more=dict(optimizer="muon", grad_clip=0.0)),
    # GPT-2.
    "124m": Size(dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50257), 32, updates=4, samples=1),
}

if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__)

import contextlib
import copy
import functools
import gc
import importlib.util
import json
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import train
from beam import beam_search
from generate import generate, pick_tokens
from machine.capture import compile_steps, first_line, record, warm_up
from machine.device import (
    DTYPES,
    device_name,
    peak_flops,
    peak_memory,
    pick_device,
    prepare_kernels,
    synchronize,
)
from machine.distributed import World
from model import GPT, GPTConfig, init_weights
from optimizer import make_optimizers, set_rates
from run.cost import flops_per_token
from seq2seq import Seq2Seq, Seq2SeqConfig
from tasks.task import Task
from vit import ViTConfig, init_parts
from vlm import GemmaConfig, PaliGemma, PaliGemmaConfig

ROOT = Path(__file__).resolve().parents[1]


def reset_peak_memory(device):
    """Makes `peak_memory` start again from the present use, on CUDA and on Linux; elsewhere it can't be reset."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # "reset the peak resident set size": man 5 proc


class Table:
    """The rows measured so far. Each is printed as soon as it is added."""

    def __init__(self, settings, device):
        self.settings, self.device, self.rows = settings, device, []
        self.bandwidth = 0  # bytes read per second, once it was measured

    def compare(self, section, cases, unit="ms", amount=0, calls=1, **more):
        """Measures cases, {name: function}, in turns, and returns {name: its row}.

        unit: ms or s per call, or what each call makes `amount` of, per second. A function that returns an int, as
        `command`'s do, returns its peak memory in bytes. For others, the growth of this process's peak is measured.
        calls: how many to make before waiting for the device. more: see `add`.
        """
        seconds, memory = {name: [] for name in cases}, dict.fromkeys(cases, 0)
        for run in range(self.settings.repeats + 1):
            for name, work in cases.items():
                reset_peak_memory(self.device)
                synchronize(self.device)
                before, start = peak_memory(self.device), time.perf_counter()
                for _ in range(calls):
                    result = work()
                synchronize(self.device)
                if run > 0:  # the first one warms up
                    seconds[name].append((time.perf_counter() - start) / calls)
                used = result if isinstance(result, int) else peak_memory(self.device) - before
                memory[name] = max(memory[name], used)
        rows = {}
        for name, times in seconds.items():
            values = [amount / t for t in times] if amount else [t * {"ms": 1000, "s": 1}[unit] for t in times]
            used = {"MiB": round(memory[name] / 2**20)} if memory[name] >= 2**20 else {}
            rows[name] = self.add(section, name, unit, values, **used, **more)
        return rows

    def add(self, section, case, unit, values, **more):
        """Adds and returns a row of the measured values. more: other figures of the case, {unit: value}."""
        values = sorted(values)
        row = dict(section=section, case=case, unit=unit, median=statistics.median(values), least=values[0],
                   most=values[-1], **more)
        self.rows.append(row)
        digits = 2 if row["median"] < 10 else 0
        median, least, most = (f"{row[name]:,.{digits}f}" for name in ("median", "least", "most"))
        beside = "".join(f"  {value:,} {name}" for name, value in more.items())
        print(f"{section:9} {case:44} {f'{median} ({least}-{most}) {unit}':36}{beside}", flush=True)
        return row

    def floor(self, model, count):
        """{"floor tokens/s": number}, for `count` samples at once; {} unless the speed of reading was measured."""
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        return {"floor tokens/s": round(count * self.bandwidth / size)} if self.bandwidth else {}


def words(text):
    return text.split(",")


def seeded(seed=1337):
    return torch.Generator().manual_seed(seed)


def new_gpt(shape, dropout=0.0):
    model = GPT(GPTConfig(**shape, dropout=dropout))
    init_weights(model, seeded())
    return model


def peers(settings):
    """The transformers module, or None if it is not wanted or not installed."""
    if not settings.transformers or importlib.util.find_spec("transformers") is None:
        return None
    import transformers
    transformers.logging.set_verbosity_error()
    return transformers


def their_gpt(transformers, shape, dropout=0.0):
    """transformers' GPT-2 of this shape. It has biases, which our model has not."""
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=shape["n_layer"], n_head=shape["n_head"], n_embd=shape["n_embd"], n_positions=shape["block_size"],
        vocab_size=shape["vocab_size"], resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout,
        bos_token_id=0, eos_token_id=None))


# ----------------------------------------------------------------------------------------------------------------------
# Sections

def measure_peak(table):
    """The speed of matrix products and of reading memory, which bound all other figures."""
    cuda = table.device.type == "cuda"
    for name in words(table.settings.dtypes):
        dtype, n = DTYPES[name], 8192
        if cuda:
            a = torch.randn(n, n, device=table.device, dtype=dtype)
            product = functools.partial(torch.mm, a, a)
            table.compare("peak", {f"matrix products, {name}": product}, "GFLOP/s", 2 * n**3 / 1e9, calls=20)
        speed = [peak_flops(table.device, dtype) for _ in range(1 if cuda else table.settings.repeats)]
        if None not in speed:
            where = " by the data sheet" if cuda else ""
            table.add("peak", f"matrix products, {name}{where}", "GFLOP/s", [x / 1e9 for x in speed])
    x = torch.ones(2**26, device=table.device)
    rows = table.compare("peak", {"reading 256 MiB": lambda: x.sum()}, calls=100 if cuda else 1)
    if cuda:
        table.bandwidth = 2**28 / (rows["reading 256 MiB"]["median"] / 1000)


class OneBatch(Task):
    """A text task whose every update sees the same batch: tokens (B, T + 1). settings: further ones of train.py."""

    fixed_shapes = True

    def __init__(self, tokens, device, **settings):
        super().__init__(train.Settings(batch_size=len(tokens), micro_batch_size=len(tokens), **settings))
        self.arguments = {"tokens": tokens[:, :-1].to(device), "targets": tokens[:, 1:].to(device)}
        self.weights = torch.ones(self.arguments["targets"].shape, device=device)

    def pick(self, step):
        return range(self.settings.batch_size)

    def weight(self, rows):
        return self.weights.numel()

    def batch(self, rows, generator):
        return self.arguments, self.weights


class TheirNats(torch.nn.Module):
    """Wraps a transformers model to be called as ours are: it returns the nats of each target, (B, T)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens, targets):
        logits = self.model(tokens, use_cache=False).logits  # (B, T, V)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def measure_train(table):
    """One update of train.py, always on the same batch: forward, backward, clipping, the optimizer's step."""
    settings, device = table.settings, table.device
    for size in words(settings.sizes):
        shape, batch_size, *_ = SHAPES[size]
        T = shape["block_size"]
        with torch.device("meta"):  # without weights
            flops = batch_size * T * flops_per_token(GPT(GPTConfig(**shape)), T)
        for name in words(settings.dtypes):
            prepare_kernels(device, DTYPES[name], fixed_shapes=True)  # as train.py does
            peak = peak_flops(device, DTYPES[name])
            for row in compare_updates(table, size, name):
                seconds = row["median"] / 1000
                row["tokens/s"], row["of peak"] = batch_size * T / seconds, peak and flops / seconds / peak
                share = f", {row['of peak']:.1%} of peak" if peak and row["of peak"] < 1 else ""
                print(f"{'':44} {row['tokens/s']:,.0f} tokens/s{share}", flush=True)
        if device.type == "cuda":
            measure_muon(table, size)


def compare_updates(table, size, dtype):
    """Measures all kinds of update of this size, and yields their rows.

    On CUDA one kind follows the other, and its memory is freed: several models of 124M parameters may not fit at once.
    """
    shape, _, dropout, updates, _, more = SHAPES[size]  # `more`: transformers has no such model
    settings, cuda, transformers = table.settings, table.device.type == "cuda", peers(table.settings)
    kinds = {", ours captured": True, ", ours kernel by kernel": False} if cuda else {", ours": False}
    builds = {kind: (functools.partial(new_gpt, shape, dropout), capture) for kind, capture in kinds.items()}
    if transformers and not more:
        builds[", transformers"] = (lambda: TheirNats(their_gpt(transformers, shape, dropout)), False)
    cases = {}
    for kind, (build, capture) in builds.items():
        for compiled in (False, True)[:1 + settings.compile]:
            case = f"{size}, {dtype}{kind}{' compiled' * compiled}"
            cases[case] = functools.partial(updating, table, size, DTYPES[dtype], build, capture, compiled)
    if not cuda:
        yield from table.compare("train", {case: start() for case, start in cases.items()}).values()
        return
    for case, start in cases.items():
        try:
            yield from table.compare("train", {case: start()}, calls=updates).values()
        except (UserError, torch.OutOfMemoryError) as error:
            print(f"train     {case:44} {first_line(error)}", flush=True)
        free(table.device)


def updating(table, size, dtype, build, capture, compiled):
    """A function that makes an update of a new model, as train.py does. On CUDA it returns its peak memory in bytes.

    Raises UserError if the update can't be captured as it should.
    """
    device, (shape, batch_size, _, _, _, more) = table.device, SHAPES[size]
    reset_peak_memory(device)
    before, world = peak_memory(device), World(0, 1, device)
    tokens = torch.randint(shape["vocab_size"], (batch_size, shape["block_size"] + 1), generator=seeded())
    task = OneBatch(tokens, device, capture=capture, **more)
    model = build().to(device).train()
    if compiled:
        torch.compiler.reset()  # or code for the last shape would be compiled again, for all shapes
    work, why_not = train.make_work(task, model, torch.compile(model) if compiled else model, None, {"step": 0}, world,
                                    dtype)
    if capture and why_not:
        raise UserError(f"not captured: {why_not}")

    def update():
        set_rates(work.optimizers, 1, task.settings)
        train.update(task, work, 0, world)
        return used

    used = None
    if device.type == "cuda":
        for _ in range(2):  # the first one makes the moments
            update()
        used = peak_memory(device) - before
    return update


def free(device):
    """Returns the memory of what is no longer used to the GPU."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure_muon(table, size):
    """Muon's step by itself, without forward and backward pass; on CUDA as a graph, as train.py captures it."""
    model, cuda = new_gpt(SHAPES[size].shape).to(table.device), table.device.type == "cuda"
    muon = make_optimizers(model, train.Settings(optimizer="muon"), capturable=cuda)["muon"]
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    step = muon.step
    if cuda:
        warm_up(muon.step, [])
        graph, _ = record(muon.step)
        step = graph.replay
    table.compare("train", {f"{size}, Muon's step alone": step}, calls=20 if cuda else 1)


def measure_sample(table):
    """Tokens per second, added over the samples of a batch, and the time to the first; they are not decoded to text.

    On CUDA each run of ours records its own graph, as a user's does.
    """
    settings, device, transformers = table.settings, table.device, peers(table.settings)
    for size in words(settings.sizes):
        shape, most = SHAPES[size].shape, SHAPES[size].samples
        counts = [n for n in map(int, words(settings.batches)) if n <= most]
        if not counts:
            continue
        new_tokens = min(settings.new_tokens, shape["block_size"] - 1)
        for name in words(settings.dtypes):
            dtype = DTYPES[name]
            ours = new_gpt(shape).to(device, dtype).eval()
            theirs = their_gpt(transformers, shape).to(device, dtype).eval() if transformers else None
            for count in counts:
                prompt = torch.zeros(count, 1, dtype=torch.long, device=device)
                work = {"ours": functools.partial(our_samples, ours, prompt)}
                if settings.compile and device.type == "cuda":
                    compiled = copy.deepcopy(ours)
                    compile_steps(compiled, device)
                    work["ours compiled"] = functools.partial(our_samples, compiled, prompt)
                if theirs:
                    work["transformers"] = functools.partial(their_samples, theirs, prompt)
                case = f"{size}, {name}, {count} at once"
                table.compare("sample", {f"{case}, first token, {who}": functools.partial(sample, 1)
                                         for who, sample in work.items()})
                table.compare("sample", {f"{case}, {who}": functools.partial(sample, new_tokens)
                                         for who, sample in work.items()},
                              "tokens/s", count * new_tokens, **table.floor(ours, count))
            free(device)


def their_samples(model, prompt, new_tokens):
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens,
                   do_sample=True, temperature=0.8, top_k=200, pad_token_id=0)


def our_samples(model, prompt, new_tokens):
    generator = torch.Generator(prompt.device)
    pick = functools.partial(pick_tokens, temperature=0.8, top_k=200, generator=generator)
    for tokens in generate(model, prompt, new_tokens, pick):
        tokens.tolist()


VISION = dict(n_layer=4, n_head=4, n_embd=256, n_hidden=1024, image_size=224, patch_size=14)  # of the small PaliGemma
TEXT = dict(n_layer=6, n_head=8, n_kv_head=1, n_embd=512, head_dim=64, n_hidden=2048, vocab_size=8192, block_size=1024)


def measure_vlm(table, prompt_tokens=16, new_tokens=64):
    """A small PaliGemma with random weights: the time to the first token of an answer, and the tokens/s after it."""
    settings, device, transformers = table.settings, table.device, peers(table.settings)
    for name in words(settings.dtypes):
        dtype = DTYPES[name]
        ours = PaliGemma(PaliGemmaConfig(ViTConfig(**VISION), GemmaConfig(**TEXT)))
        init_parts(ours, seeded())
        ours.to(device, dtype).eval()
        theirs = their_paligemma(transformers).to(device, dtype).eval() if transformers else None
        for n in (1, 8):
            images = torch.rand(n, 3, 224, 224, generator=seeded()).to(device) * 2 - 1
            work = {"ours": functools.partial(our_answers, ours, images, prompt_tokens)}
            if theirs:
                work["transformers"] = functools.partial(their_answers, theirs, images.to(dtype), prompt_tokens)
            if theirs and device.type == "cuda":
                work |= with_static_cache(work["transformers"], settings.compile)
            rows = []
            for count in (1, new_tokens):
                cases = {f"{name}, {n} at once, {count} tokens, {who}": functools.partial(answer, count)
                         for who, answer in work.items()}
                rows.append(table.compare("vlm", cases).values())
            for who, first, whole in zip(work, *rows):
                times = [whole[x] - first["median"] for x in ("least", "median", "most")]  # ms
                table.add("vlm", f"{name}, {n} at once, after the first, {who}", "tokens/s",
                          [1000 * n * (new_tokens - 1) / time for time in times], **table.floor(ours.decoder, n))


@torch.inference_mode()
def our_answers(model, images, prompt_tokens, count):
    prompts = torch.ones(len(images), prompt_tokens, dtype=torch.long, device=images.device)
    pick = functools.partial(pick_tokens, temperature=0)
    for tokens in generate(model, prompts, count, pick, image=model.encode(images)):
        tokens.tolist()


def their_answers(model, images, prompt_tokens, count, **more):
    ids = torch.tensor([[8191] * 256 + [1] * prompt_tokens] * len(images), device=images.device)
    model.generate(input_ids=ids, pixel_values=images, attention_mask=torch.ones_like(ids),
                   token_type_ids=torch.zeros_like(ids), max_new_tokens=count, min_new_tokens=count, do_sample=False,
                   **more)


def with_static_cache(answer, compiled):
    """{"transformers static": answer, with keys and values in buffers of a fixed size}; {} if that fails here.

    compiled: let transformers compile its steps, as it does by default with such a cache; this takes a minute.
    """
    static = functools.partial(answer, cache_implementation="static", disable_compile=not compiled)
    try:
        static(2)
    except Exception as error:  # of any kind: it is not our code
        print(f"vlm       {'transformers static':44} {first_line(error)}", flush=True)
        return {}
    return {"transformers static": static}


def their_paligemma(transformers):
    vision = dict(num_hidden_layers=VISION["n_layer"], num_attention_heads=VISION["n_head"],
                  hidden_size=VISION["n_embd"], intermediate_size=VISION["n_hidden"], image_size=VISION["image_size"],
                  patch_size=VISION["patch_size"], model_type="siglip_vision_model", vision_use_head=False)
    text = dict(num_hidden_layers=TEXT["n_layer"], num_attention_heads=TEXT["n_head"],
                num_key_value_heads=TEXT["n_kv_head"], hidden_size=TEXT["n_embd"], head_dim=TEXT["head_dim"],
                intermediate_size=TEXT["n_hidden"], vocab_size=TEXT["vocab_size"], model_type="gemma")
    return transformers.PaliGemmaForConditionalGeneration(transformers.PaliGemmaConfig(
        vision_config=vision, text_config=text, image_token_index=8191, projection_dim=TEXT["n_embd"],
        hidden_size=TEXT["n_embd"]))


TRANSLATOR = dict(n_layer=3, n_head=4, n_embd=128, vocab_size=4000, block_size=128)  # as in translate_en_it


def measure_translate(table, source_tokens=20, new_tokens=30):
    """A small encoder-decoder with random weights, beside transformers' Marian: greedily and with a beam of 4.

    All translations have as many tokens. Of several sources, all but one are shorter than source_tokens.
    """
    device, transformers = table.device, peers(table.settings)
    ours = Seq2Seq(Seq2SeqConfig(**TRANSLATOR))
    init_weights(ours, seeded(), std=TRANSLATOR["n_embd"] ** -0.5)
    models = {"ours": (ours, our_translations)}
    if transformers:
        models["transformers"] = (their_marian(transformers), their_translations)
    for n in (1, 32):
        source = torch.randint(2, TRANSLATOR["vocab_size"], (n, source_tokens), generator=seeded()).to(device)
        lengths = torch.linspace(source_tokens, source_tokens // 2, n, device=device).long()
        for beam in (1, 4):
            table.compare("translate", {
                f"{n} at once, beam {beam}, {who}": functools.partial(work, model.to(device).eval(), source, lengths,
                                                                      beam, new_tokens)
                for who, (model, work) in models.items()}, "sentences/s", n)


@torch.inference_mode()
def our_translations(model, source, lengths, beam, count):
    start, context = torch.ones_like(source[:, :1]), model.encode(source, lengths)
    if beam > 1:
        beam_search(model, start, count, beam, -1, 1.0, **context)  # no token is -1, so none ends a translation
    else:
        pick = functools.partial(pick_tokens, temperature=0)
        torch.stack(list(generate(model, start, count, pick, **context))).tolist()


def their_translations(model, source, lengths, beam, count):
    real = (torch.arange(source.size(1), device=source.device) < lengths[:, None]).long()
    model.generate(input_ids=source, attention_mask=real, max_new_tokens=count, num_beams=beam, do_sample=False,
                   eos_token_id=None).tolist()


def their_marian(transformers):
    C, L, H = TRANSLATOR["n_embd"], TRANSLATOR["n_layer"], TRANSLATOR["n_head"]
    return transformers.MarianMTModel(transformers.MarianConfig(
        vocab_size=TRANSLATOR["vocab_size"], d_model=C, encoder_layers=L, decoder_layers=L, encoder_attention_heads=H,
        decoder_attention_heads=H, encoder_ffn_dim=4 * C, decoder_ffn_dim=4 * C, activation_function="relu",
        max_position_embeddings=TRANSLATOR["block_size"], scale_embedding=True, pad_token_id=1, eos_token_id=None,
        decoder_start_token_id=1, forced_eos_token_id=None))


def measure_start(table):
    """Whole commands, from their start to their exit."""
    python, here = sys.executable, str(ROOT)
    commands = {name: [python, f"{name}.py"] for name in ("train", "sample", "evaluate", "prepare")}
    commands["bench"] = [python, "-m", "tools.bench"]
    cases = {f"{name} --help": command([*argv, "--help"], here) for name, argv in commands.items()}
    cases["train.py --batchsize=32"] = command([*commands["train"], "--batchsize=32"], here, status=2)
    cases["import torch"] = command([python, "-c", "import torch"], here)
    table.compare("start", cases, "s")
    with tempfile.TemporaryDirectory() as folder:
        out = [f"--out_dir={folder}/run", "--device=cpu"]
        update = [*commands["train"], *out, "--max_iters=1", "--eval_tokens=64", "--sample_tokens=0"]
        command(update, here)()  # leaves what sample.py samples
        sample = [*commands["sample"], *out, "--max_new_tokens=1"]
        table.compare("start", {"one update, evaluated and saved": command(update, here),
                                "one token": command(sample, here)}, "s")


def measure_against(table):
    """The command lines --ours and --against, each from its start to its exit, with their peak memory."""
    if table.settings.against:
        lines = {"ours": table.settings.ours, "theirs": table.settings.against}
        cases = {who: command(shell_words(line), ".") for who, line in lines.items()}
        for who, row in table.compare("against", cases, "s").items():
            row["command"] = lines[who]


def command(argv, folder, status=0):
    """A function that runs the command and returns its peak memory in bytes, or 0 if that is unknown.

    argv: the list of its words. folder: the working folder that it runs in. The function raises UserError if the
    command can't be started, or ends with an exit status other than `status`.
    """
    def work():
        with tempfile.TemporaryFile() as output:
            try:
                process = subprocess.Popen(argv, cwd=folder, stdout=output, stderr=output)
            except OSError as error:
                raise UserError(f"{shlex.join(argv)}: can't be started: {error.strerror}") from None
            if hasattr(os, "wait4"):
                _, ended, usage = os.wait4(process.pid, 0)
                process.returncode = os.waitstatus_to_exitcode(ended)
            if process.wait() != status:
                output.seek(0)
                last = (output.read().decode(errors="replace").strip() or "it printed nothing").splitlines()[-1]
                raise UserError(f"{shlex.join(argv)} ended with status {process.returncode}: {last}")
            if not hasattr(os, "wait4"):
                return 0
            used = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
            return used if used > peak_memory(torch.device("cpu")) else 0  # it begins as a copy of this process
    return work


def main(settings):
    device = pick_device(settings.device)
    settings = settings.on(device)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    table = Table(settings, device)
    about = dict(machine=device_name(device) or platform.machine(), device=str(device), cores=os.cpu_count(),
                 threads=torch.get_num_threads(), python=platform.python_version(), torch=torch.__version__)
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    for section in words(settings.only):
        globals()[f"measure_{section}"](table)
        free(device)
    with open(settings.out, "w", encoding="utf-8") as file:
        json.dump({**about, "rows": table.rows}, file, indent=1)
    print(f"wrote {settings.out}")


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
