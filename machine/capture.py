"""CUDA graphs: a GPU gets all kernels of an update, or of a step of generation, in one launch.

The kernels of a small model take less time than their launches. A CUDA graph is recorded once; each replay then runs
the same kernels, on tensors of the same shapes, at the same addresses. So inputs are copied into fixed buffers, and
whoever keeps a result needs a copy, because the next replay overwrites it. Weights may change: a replay reads them.

A graph records what the model's own code does, so an edited block is recorded as it is. Python inside that code runs
only while recording; that is why modules with hooks are never recorded.

Axes: B batch.
"""

import contextlib
import functools

import torch
from torch.nn.modules import module as torch_module

from configurator import UserError, say
from machine.device import cudnn_attention, has_triton

# Attention of one token by cuDNN: to plan it takes up to 0.9 s for each new shape. Then a step takes less time, by so
# much for each layer, and so much for each row of each layer. Measured on an H200: 6 heads of 64, 256 positions.
CUDNN_PLAN, CUDNN_SAVES, CUDNN_SAVES_PER_ROW = 0.9, 2e-6, 7e-8  # seconds


def can_capture(model, device):
    """Whether graphs can stand in for the calls of a model's modules: on CUDA, unless a hook would miss them."""
    everywhere = torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks
    return device.type == "cuda" and not everywhere and not any(
        module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def warm_up(work, kept, generator=None):
    """Runs work() once, and restores the tensors `kept` and the generator. Must come before `record`.

    In the first run, libraries choose kernels and need memory for them, and torch.compile compiles.
    """
    copies = [tensor.clone() for tensor in kept]
    state = generator and generator.get_state()
    try:
        with side_stream():
            work()
    finally:
        for tensor, copy in zip(kept, copies):
            tensor.copy_(copy)
        if generator:
            generator.set_state(state)


@contextlib.contextmanager
def side_stream():
    """A context in which CUDA works on another stream, as a recording needs: after all before, before all after."""
    stream, main = stream_of(torch.cuda.current_device()), torch.cuda.current_stream()
    stream.wait_stream(main)
    with torch.cuda.stream(stream):
        yield
    main.wait_stream(stream)


@functools.cache
def stream_of(device):
    """The same one each time, because libraries keep memory for each stream."""
    return torch.cuda.Stream(device)


def first_line(error):
    return str(error).partition("\n")[0]


def record(work, generator=None, pool=None):
    """Returns (a graph of work(), its result), without running it: a replay fills the result's tensors.

    generator: what work draws from, beside the default generator. pool: another graph's `pool()`. The two share memory
    then, and must always be replayed in the order in which they were recorded.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    if generator:
        graph.register_generator_state(generator)
    try:  # thread_local, because another thread may be writing a checkpoint
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = work()
    except RuntimeError:
        restore(stream, generator)
        raise
    return graph, result


def restore(stream, generator):
    """Undoes what a recording that failed leaves behind in PyTorch: another stream, generators that seem to record."""
    torch.cuda.set_stream(stream)
    for each in (torch.cuda.default_generators[stream.device_index], generator):
        if each:
            each.graphsafe_set_state(each.clone_state())


# ----------------------------------------------------------------------------------------------------------------------
# Training

def obstacle_to_capture(task, world, dtype):
    """Why a run's updates can't be CUDA graphs, in words; None if they can."""
    s = task.settings
    uneven = s.batch_size % (s.micro_batch_size or s.batch_size) > 0
    obstacles = {"capture = False": not s.capture,
                 f"the device is {world.device.type}": world.device.type != "cuda",
                 "there are several workers": world.size > 1,
                 "float16 decides on the CPU which updates to skip": dtype == torch.float16,
                 "recompute = True": s.recompute,
                 "its batches have different shapes": not task.fixed_shapes,
                 "micro_batch_size does not divide batch_size": uneven}
    return next((why for why, true in obstacles.items() if true), None)


class CapturedWork:
    """Stands in for train.py's Work, with the same methods. All micro-batches must have the same shapes.

    It has three graphs, which share memory: the first micro-batch of an update, which sets the gradients; each other
    one, which adds to them; and the optimizers' step. The optimizers must be `capturable`: see optimizer.py.
    """

    def __init__(self, work, arguments, weights):
        """Records the methods of `work`. arguments, weights: of any micro-batch. Changes no weight and no moment."""
        self.wrapped, self.optimizers, self.scaler, self.fresh = work.wrapped, work.optimizers, work.scaler, True
        self.arguments, self.weights = {name: tensor.clone() for name, tensor in arguments.items()}, weights.clone()
        backward = functools.partial(work.backward, self.arguments, self.weights)

        def update():
            backward()
            backward()
            work.finish()

        before = tensors_of(work.optimizers)
        try:
            warm_up(update, [*(p.detach() for p in work.wrapped.parameters()), *before])
        finally:
            known = {id(tensor) for tensor in before}
            for tensor in tensors_of(work.optimizers):
                if id(tensor) not in known:
                    tensor.zero_()  # the warm-up made it; all of an optimizer's state starts with zeros
        self.first, self.first_result = record(backward)
        self.other, self.other_result = record(backward, pool=self.first.pool())
        self.gradients = [p.grad for p in work.wrapped.parameters()]  # so that nothing else gets their memory
        self.last, self.norm = record(work.finish, pool=self.first.pool())

    def backward(self, arguments, weights):
        self.weights.copy_(weights)
        for name, tensor in arguments.items():
            self.arguments[name].copy_(tensor)
        graph, (loss, shown) = (self.first, self.first_result) if self.fresh else (self.other, self.other_result)
        graph.replay()
        self.fresh = False
        return loss.clone(), {name: value.clone() for name, value in shown.items()}

    def finish(self):
        self.last.replay()
        self.fresh = True
        return self.norm.clone()


def captured(work, arguments, weights):
    """Returns (work as CapturedWork, None), or (work itself, why it can't be captured)."""
    if not can_capture(work.wrapped, weights.device):
        return work, "a module has hooks"
    try:
        return CapturedWork(work, arguments, weights), None
    except RuntimeError as error:
        work.wrapped.zero_grad(set_to_none=True)
        return work, first_line(error)


def tensors_of(optimizers):
    """All tensors in the state of optimizers {name: optimizer}."""
    states = [state for optimizer in optimizers.values() for state in optimizer.state.values()]
    return [value for state in states for value in state.values() if torch.is_tensor(value)]


# ----------------------------------------------------------------------------------------------------------------------
# Generation

def compile_steps(model, device):
    """Compiles model.hidden for the steps that `generate` records. That takes up to a minute, once for each shape.

    Raises UserError without CUDA and Triton, or if the model has no such steps.
    """
    if device.type != "cuda" or not has_triton():
        raise UserError("compile = True: only steps on CUDA, with Triton installed, are compiled; drop it")
    if not hasattr(model, "make_caches"):
        raise UserError(f"compile = True: the model {type(model).__name__} has no steps to compile; drop it")
    plain, compiled = model.hidden, torch.compile(model.hidden, dynamic=False)

    def hidden(tokens, caches=None, start=0, **context):
        return (plain if isinstance(start, int) else compiled)(tokens, caches, start, **context)

    model.hidden = hidden


class CapturedStep:
    """Stands in for the function `step` in generate.py: one graph takes all steps of one token.

    caches: the model's, with `last`. generator: what the step draws from, or None. count: how many steps are planned.
    """

    def __init__(self, step, caches, generator, count):
        self.step, self.caches, self.generator, self.graph = step, caches, generator, None
        saved = count * len(caches) * (CUDNN_SAVES + CUDNN_SAVES_PER_ROW * len(caches.last))
        self.cudnn = saved > CUDNN_PLAN

    def __call__(self, tokens, start):
        """tokens: (B, T) at the positions from `start` on, an int. Returns the next token of each row, (B,).

        The next call overwrites what this one returned.
        """
        if start == 0:  # a prompt, or the part of a full window that is encoded again
            return self.step(tokens, start)
        if self.graph is None:
            self.record(tokens, start)
        if not self.graph:
            return self.step(tokens, start)
        if start != self.next:
            self.tokens.copy_(tokens)
            self.start.fill_(start)
        self.graph.replay()
        self.next = start + 1
        return self.chosen

    def record(self, tokens, start):
        self.tokens, self.start, self.next = tokens.clone(), torch.tensor([start], device=tokens.device), start

        def work():
            """A step that also prepares the next one, which saves launches."""
            chosen = self.step(self.tokens, self.start)
            self.tokens.copy_(chosen[:, None])
            self.start.add_(1)
            return chosen

        try:  # the warm-up writes keys and values too, but the first replay writes the same ones
            with cudnn_attention(self.cudnn):
                warm_up(work, [self.caches.last, self.tokens, self.start], self.generator)
                self.graph, self.chosen = record(work, self.generator)
        except RuntimeError as error:
            say(f"the steps can't be captured as a CUDA graph ({first_line(error)}), so they are slower")
            self.graph = False


def read_ahead(steps):
    """Yields copies, on the CPU, of the tensors that `steps` yields on a GPU.

    While one is used, the GPU already computes the next. Only the first comes as soon as it is there.
    """
    waiting = []
    for number, tensor in enumerate(steps):
        copy, copied = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True), torch.cuda.Event()
        copy.copy_(tensor, non_blocking=True)
        copied.record()
        waiting.append((copy, copied))
        if number != 1:
            yield finished(*waiting.pop(0))
    yield from (finished(*pair) for pair in waiting)


def finished(copy, copied):
    copied.synchronize()
    return copy
