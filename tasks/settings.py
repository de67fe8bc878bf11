"""The settings that each task adds to those of train.py, sample.py and evaluate.py. Importing them imports no torch.

A setting that would do nothing for the chosen task, model or optimizer is refused.
"""

import ast
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import UserError, check_idle, check_ranges, check_run, check_shape
from published import check_publish


def keys(file, *tables):
    """The keys of tables, dicts in a file of ours: a tuple of each. The file is read: importing it imports torch."""
    code = ast.parse((Path(__file__).parents[1] / file).read_text(encoding="utf-8"))
    found = {node.targets[0].id: node.value for node in code.body
             if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict)}
    return [tuple(key.value for key in found[table].keys) for table in tables]


NORMS, MLPS, BLOCKS, POSITIONS = keys("model.py", "NORMS", "MLPS", "BLOCKS", "POSITIONS")
OPTIMIZERS, = keys("optimizer.py", "OPTIMIZERS")

# ----------------------------------------------------------------------------------------------------------------------
# For train.py, joined with train.Settings: the checks of a class may read those fields too

def check_training(settings):
    """Raises UserError for a field of train.Settings that is out of range, contradicts another, or would do nothing."""
    check_ranges(settings, batch_size=1, micro_batch_size=0, max_iters=1, learning_rate=0.0, min_lr=0.0, muon_lr=0.0,
                 warmup_iters=0, lr_decay_iters=0, weight_decay=0.0, beta1=0.0, beta2=0.0, grad_clip=0.0,
                 eval_interval=1, eval_tokens=0, log_interval=1, max_minutes=0.0, save_minutes=0.0, max_grad_norm=0.0,
                 max_loss_rise=0.0, sample_tokens=0, lora_rank=0, lora_alpha=0.0, seed=0, dropout=0.0)
    check_sizes(settings)
    for name, rate in settings.rates.items():
        if not rate >= 0:
            raise UserError(f"rates.{name} = {rate}: must be at least 0")
    for name in ("beta1", "beta2", "dropout", "smoothing", "hide_rate"):
        if getattr(settings, name, 0) >= 1:
            raise UserError(f"{name} = {getattr(settings, name)}: must be below 1")
    if settings.shard and settings.dtype == "float16":
        raise UserError("shard = True: does not work with --dtype=float16; use --dtype=bfloat16")
    if settings.optimizer != "muon":
        check_idle(settings, "is for --optimizer=muon", "muon_lr")
    elif settings.shard:
        raise UserError("optimizer = 'muon': needs whole matrices; leave out --shard, or use --optimizer=adamw")
    elif not settings.learning_rate:
        raise UserError("learning_rate = 0: does not work with --optimizer=muon, whose rate falls in proportion to it")
    if settings.init_from == "scratch":
        check_idle(settings, "is for fine-tuning with --init_from", "lora_rank")
    if not settings.lora_rank:
        check_idle(settings, "is for --lora_rank above 0", "lora_alpha", "lora_targets")
    if not settings.wandb:
        check_idle(settings, "is for --wandb", "wandb_project", "wandb_name")
    if settings.lr_schedule == "noam":
        check_idle(settings, "--lr_schedule=noam falls without end", "min_lr", "lr_decay_iters")
    elif settings.min_lr > settings.learning_rate:
        raise UserError(f"min_lr = {settings.min_lr}: is above learning_rate = {settings.learning_rate}; add"
                        f" --min_lr={settings.learning_rate / 10:.3g}")
    if settings.shard and not settings.resume and os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError("shard = True: does nothing for one worker; leave it out, or start several with torchrun")
    check_publish(getattr(settings, "publish", ""), settings.out_dir, settings.init_from)


def check_sizes(settings):
    """Raises UserError for sizes and shares that can't be. A task has some of these settings."""
    least = dict(n_layer=1, n_encoder_layer=0, n_head=1, n_embd=1, n_hidden=0, block_size=1, patch_size=1, train_rows=0,
                 smoothing=0.0, hide_rate=0.0)
    check_ranges(settings, **{name: low for name, low in least.items() if hasattr(settings, name)})
    if not 0 < getattr(settings, "mask_rate", 0.5) < 1:
        raise UserError(f"mask_rate = {settings.mask_rate}: must lie between 0 and 1")
    if hasattr(settings, "n_head"):
        check_shape(settings.n_embd, settings.n_head, getattr(settings, "n_kv_head", 0), settings.dropout)


@dataclass(frozen=True)
class LanguageModel:
    # the model
    model: str = "gpt"  # gpt, gemma, or another name in MODELS of tasks/text.py
    n_layer: int = 2  # blocks
    n_head: int = 2  # attention heads
    n_kv_head: int = 0  # key-value heads, each shared by several attention heads; 0: as many as n_head
    n_embd: int = 64  # width: channels of a token's vector
    block_size: int = 64  # context length in tokens
    bias: bool = False  # whether linear layers and LayerNorms have a bias
    norm: Literal[("", *NORMS)] = ""  # see NORMS in model.py; empty: the model's own
    mlp: Literal[("", *MLPS)] = ""  # see MLPS in model.py; empty: the model's own
    n_hidden: int = 0  # width inside the MLP; 0: 4 * n_embd
    positions: Literal[("", *POSITIONS)] = ""  # of the tokens; empty: the model's own
    qk_norm: bool = False  # normalise each head's queries and keys: attention stays stable at higher learning rates
    tied: bool = True  # use the token embedding as the output head too
    bigrams: bool = False  # also embed each pair of neighbouring tokens; for small vocabularies
    zero_init: bool = False  # start the last matrices of each block at zero, so that it adds nothing at first

    def __post_init__(self):
        if self.init_from != "scratch":
            check_idle(self, "is for a model that starts from scratch", "zero_init")


@dataclass(frozen=True)
class Text(LanguageModel):
    publish: str = ""  # folder to write the best model to at the end, as transformers can load it


@dataclass(frozen=True)
class Arithmetic(Text):
    # the problems
    dataset: str = "arithmetic"  # arithmetic: the task makes its problems
    operations: str = "+"  # some of + - *
    digits: int = 2  # most digits of an operand
    working: bool = False  # write the rows of a long multiplication before the answer

    def __post_init__(self):
        super().__post_init__()
        check_sample_tokens(self)
        if not self.operations or len(set(self.operations) & set("+-*")) < len(self.operations):
            raise UserError(f"operations = {self.operations!r}: must be one or several of +, - and *, each once")
        if "*" not in self.operations:
            check_idle(self, "is for --operations with *", "working")
        if not 1 <= self.digits <= 3:
            raise UserError(f"digits = {self.digits}: must be from 1 to 3, for the problems are counted in memory")


@dataclass(frozen=True)
class Chat(Text):
    pack: bool = True  # fill each row with whole dialogues; False: one dialogue per row


@dataclass(frozen=True)
class Reward(LanguageModel):
    sft: float = 0.0  # weight of the chosen answer's own mean nats, added to the loss

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, sft=0.0)
        check_idle(self, "a reward model is a GPT with a score instead of its head", "model", "tied")


@dataclass(frozen=True)
class DPO:
    beta: float = 0.1  # how dearly the model pays for leaving its reference; a small one lets it go further
    sft: float = 0.0  # weight of the chosen answer's own mean nats, added to the loss
    publish: str = ""  # folder to write the best model to at the end, as transformers can load it

    def __post_init__(self):
        check_ranges(self, sft=0.0)
        if not self.beta > 0:
            raise UserError(f"beta = {self.beta}: must be above 0")
        if self.init_from == "scratch":
            raise UserError("init_from = 'scratch': --task=dpo goes on from a model that answers; add --init_from=RUN")
        if self.shard:
            raise UserError("shard = True: --task=dpo keeps a whole copy of the model it starts from; leave it out")


@dataclass(frozen=True)
class RL:
    # the roll-outs
    method: Literal["group", "ppo"] = "group"  # advantages over other answers to the question, or over a value head
    reward: str = ""  # folder of a reward model's run, which scores the answers; empty: the world checks them
    samples: int = 8  # answers to each question
    round: int = 4  # updates that learn from one roll-out, of batch_size * round / epochs answers
    epochs: int = 1  # how often a round learns from each answer
    answer_tokens: int = 0  # most tokens of an answer; 0: as many as the world's longest answer needs, or 64
    # the loss
    clip: float = 0.2  # ratios of new and old probabilities further than this from 1 are not rewarded
    kl: float = 0.0  # price of a nat of divergence from the model that the run started from
    entropy: float = 0.0  # bonus for a nat of entropy: it keeps the answers varied
    divide: bool = True  # divide a group's advantages by their standard deviation
    lam: float = 1.0  # of PPO's advantages: below 1, they trust the value head more
    value_weight: float = 0.5  # weight of the value head's squared error, for PPO
    # what is measured, and published
    pack: bool = True  # validation loss of rows filled with whole dialogues; False: of one dialogue per row
    publish: str = ""  # folder to write the best model to at the end, as transformers can load it

    def __post_init__(self):
        check_ranges(self, samples=1, round=1, epochs=1, answer_tokens=0, clip=0.0, kl=0.0, entropy=0.0, lam=0.0,
                     value_weight=0.0)
        if self.lam > 1:
            raise UserError(f"lam = {self.lam}: must be at most 1")
        if self.method == "group":
            check_idle(self, "is for --method=ppo", "lam", "value_weight")
            if self.samples == 1:
                raise UserError("samples = 1: an answer has no other answers to be compared with; use at least 2")
        else:
            check_idle(self, "is for --method=group", "divide")
        for name in ("max_iters", "eval_interval"):
            if getattr(self, name) % self.round:
                raise UserError(f"{name} = {getattr(self, name)}: must be a multiple of round = {self.round}: a run"
                                " evaluates and saves after whole rounds")
        if self.batch_size * self.round % self.epochs:
            raise UserError(f"epochs = {self.epochs}: must divide batch_size * round = {self.batch_size * self.round}")
        if self.batch_size * self.round % (self.epochs * self.samples):
            raise UserError(f"samples = {self.samples}: must divide the answers of a round, batch_size * round / epochs"
                            f" = {self.batch_size * self.round / self.epochs:g}")
        if self.dropout:
            raise UserError(f"dropout = {self.dropout}: an answer must be learned with the probability with which it"
                            " was drawn; leave it out")
        if self.shard:
            raise UserError("shard = True: a sharded model can't write answers; leave it out")
        if self.init_from == "scratch":
            raise UserError("init_from = 'scratch': --task=rl goes on from a model that answers; add --init_from=RUN")
        if self.reward and not self.resume:
            check_run(self.reward)
            if f"{os.path.realpath(self.reward)}/".startswith(f"{os.path.realpath(self.out_dir)}/"):
                raise UserError(f"reward = {self.reward}: lies in out_dir = {self.out_dir}, whose earlier run is moved"
                                " away; choose another --out_dir")


@dataclass(frozen=True)
class Vision:
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width: channels of a patch's vector
    patch_size: int = 8  # side of a square patch, in pixels


@dataclass(frozen=True)
class Contrastive:
    # the model: a vision tower and a text encoder
    n_layer: int = 2  # blocks of the text encoder
    n_head: int = 2  # attention heads of the text encoder
    n_embd: int = 64  # width of the text encoder
    block_size: int = 64  # most tokens of a caption
    pair_loss: Literal["sigmoid", "softmax"] = "sigmoid"  # sigmoid: SigLIP's loss; softmax: CLIP's
    vision: Vision = Vision()  # the vision tower

    def __post_init__(self):
        check_sample_tokens(self)
        if self.shard:
            raise UserError("shard = True: the scalar parameters of --task=contrastive can't be sharded; leave it out")


@dataclass(frozen=True)
class ImageText:
    # the model: a vision tower and a decoder
    n_layer: int = 2  # blocks of the decoder
    n_head: int = 2  # attention heads of the decoder
    n_kv_head: int = 0  # its key-value heads, each shared by several attention heads; 0: as many as n_head
    n_embd: int = 64  # width of the decoder
    block_size: int = 64  # context length: image tokens and text tokens together
    bias: bool = False  # whether the decoder's linear layers have a bias
    init_vision: str = ""  # folder of a contrastive run; the model starts with its vision tower
    init_decoder: str = ""  # folder of a text run with --model=gemma; the decoder starts with its blocks
    publish: str = ""  # folder to write the best model to at the end, as transformers can load it
    vision: Vision = Vision()  # the vision tower

    def __post_init__(self):
        if self.init_from != "scratch":
            check_idle(self, "is for a model that starts from scratch", "init_vision", "init_decoder")
        check_sample_tokens(self)


@dataclass(frozen=True)
class Translation:
    batch_size: int = 2048  # tokens per update, all workers together: of both languages, padding included
    micro_batch_size: int = 0  # tokens per forward and backward pass; 0: batch_size / number of workers
    # the model: an encoder and a decoder
    n_layer: int = 2  # blocks of the decoder
    n_encoder_layer: int = 0  # blocks of the encoder; 0: as many as n_layer
    n_head: int = 2  # attention heads
    n_embd: int = 64  # width: channels of a token's vector
    n_hidden: int = 0  # width inside the MLP; 0: 4 * n_embd
    block_size: int = 128  # most tokens of a source, and of a target; longer pairs are left out
    bias: bool = True  # whether linear layers and LayerNorms have a bias
    norm: Literal[NORMS] = "layernorm"  # see NORMS in model.py
    mlp: Literal[("relu", *MLPS)] = "relu"  # see MLPS in model.py
    block: Literal[BLOCKS] = "pre"  # norms before attention and MLP, or, as in the paper, after them
    positions: Literal[POSITIONS] = "sinusoidal"  # of the tokens
    tied: bool = True  # use the target embedding as the output head too
    smoothing: float = 0.1  # share of each target's weight that is spread over the whole vocabulary

    def __post_init__(self):
        check_sample_tokens(self)


@dataclass(frozen=True)
class Encoding:
    # the model: an encoder, which reads in both directions
    n_layer: int = 2  # blocks
    n_head: int = 2  # attention heads
    n_embd: int = 64  # width: channels of a token's vector
    n_hidden: int = 0  # width inside the MLP; 0: 4 * n_embd
    block_size: int = 64  # most tokens of a text, [CLS] included
    norm: Literal[NORMS] = "layernorm"  # see NORMS in model.py
    mlp: Literal[("gelu_erf", "relu", *MLPS)] = "gelu"  # see MLPS in model.py
    block: Literal[BLOCKS] = "pre"  # norms before attention and MLP, or after them as in BERT
    positions: Literal[POSITIONS] = "learned"  # of the tokens

    def __post_init__(self):
        check_sample_tokens(self)


@dataclass(frozen=True)
class Masked(Encoding):
    mask_rate: float = 0.15  # the share of each row's tokens that are hidden and predicted
    publish: str = ""  # folder to write the best model to at the end, as transformers can load it


@dataclass(frozen=True)
class Classification(Encoding):
    pool: Literal["mean", "first"] = "mean"  # what the head reads: the mean of all tokens, or [CLS]
    train_rows: int = 0  # learn from so many training rows only, drawn with the seed; 0: all


@dataclass(frozen=True)
class Pictures:
    # the model: a vision transformer and a linear layer
    n_layer: int = 4  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 128  # width: channels of a patch's vector
    patch_size: int = 4  # side of a square patch, in pixels
    stem: bool = False  # embed patches by convolutions that halve the sides, instead of one linear layer
    # the training pictures, which are changed anew each time
    shift: int = 0  # move each by so many pixels at most, in either direction; its edge is repeated
    flip: bool = False  # mirror each second one, left to right

    def __post_init__(self):
        check_ranges(self, shift=0)
        check_sample_tokens(self)


@dataclass(frozen=True)
class ImageClassification(Pictures):
    pool: Literal["mean", "first"] = "mean"  # what the last layer reads: the mean of all patches, or a class token
    train_rows: int = 0  # learn from so many pictures only, the same share of each class, drawn with the seed; 0: all
    publish: str = ""  # folder to write the best model to at the end, as transformers can load it


@dataclass(frozen=True)
class MaskedPatches(Pictures):
    mask_rate: float = 0.6  # the share of each picture's patches that are hidden and predicted
    normalise: bool = True  # predict pixels less their patch's mean, divided by their standard deviation


@dataclass(frozen=True)
class Columns:
    # the model: a transformer that reads a row as one list
    n_layer: int = 2  # blocks
    n_head: int = 4  # attention heads
    n_embd: int = 64  # width: channels of a token's vector
    numbers: Literal["tokens", "head"] = "tokens"  # numbers go into the list as tokens, or into the head beside it
    block_size: int = 32  # most tokens of a text; a longer one loses its end
    patch_size: int = 4  # side of a square patch of a picture, in pixels
    # the training rows
    hide_rate: float = 0.1  # the share of their values that training makes missing, drawn anew each time

    def __post_init__(self):
        check_sample_tokens(self)


@dataclass(frozen=True)
class Tagging(Encoding):
    learn: Literal["both", "tags", "intents"] = "both"  # labels of words, of sentences, or what the data have
    hide_rate: float = 0.0  # the share of tagged words (but "O") that training makes unknown: new ones will be
    train_rows: int = 0  # learn from so many training rows only, drawn with the seed; 0: all


@dataclass(frozen=True)
class QuestionAnswering(Encoding):
    answer_words: int = 30  # most words of an answer that is found
    stride: int = 0  # tokens that two windows of a long text share; 0: a third of the model's
    train_rows: int = 0  # learn from so many questions only, drawn with the seed; 0: all
    publish: str = ""  # folder to write the best model to at the end, as transformers can load it

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, answer_words=1, stride=0)


def check_sample_tokens(settings):
    """Raises UserError for a sample_tokens other than 0 or the default: the task's samples have their own length."""
    if settings.sample_tokens:
        check_idle(settings, f"the samples of --task={settings.task} have their own length; 0: none", "sample_tokens")


# ----------------------------------------------------------------------------------------------------------------------
# For sample.py, joined with sample.Settings

def check_model(settings):
    """Raises UserError if the settings name two models, or checkpoint=last and the run has no such checkpoint.

    checkpoint=best is not checked: if it is absent, `last` is loaded instead.
    """
    if not hasattr(settings, "checkpoint"):  # not from a command line: the caller has loaded the model
        return
    if hasattr(settings, "task"):
        check_idle(settings, "is for --help, for a model knows its task", "task")
    if getattr(settings, "init_from", ""):
        check_idle(settings, "does nothing beside --init_from", "out_dir", "checkpoint")
    elif os.path.isfile(os.path.join(settings.out_dir, "SHA256SUMS")):
        check_idle(settings, "--out_dir already is the folder of one checkpoint", "checkpoint")
    elif settings.checkpoint == "last" and not any(os.path.isdir(os.path.join(settings.out_dir, f"last{suffix}"))
                                                   for suffix in ("", ".new", ".old")):
        raise UserError(f"checkpoint = 'last': {settings.out_dir} has no such checkpoint; leave it out")


@dataclass(frozen=True)
class Nothing:
    """What a task adds that has no settings for sampling, or for an evaluation; and the base of what others add."""

    def __post_init__(self):
        check_model(self)


def check_drawing(settings):
    """Raises UserError if a text can't be drawn token by token in this way."""
    check_ranges(settings, max_new_tokens=1, temperature=0.0, top_k=0, top_p=0.0, seed=0)
    if not 0 < settings.top_p <= 1:
        raise UserError(f"top_p = {settings.top_p}: must be above 0 and at most 1")
    if settings.temperature == 0:
        check_idle(settings, "temperature = 0 always takes the likeliest token", "top_k", "top_p", "seed")


@dataclass(frozen=True)
class Writing(Nothing):
    # the text
    num_samples: int = 1  # how many samples to write; with images, for each of them
    max_new_tokens: int = 500  # most tokens of a sample; an answer about an image also ends at the model's block_size
    temperature: float = 0.8  # below 1 is safer, above 1 wilder; 0 always takes the likeliest token
    top_k: int = 200  # choose among the k likeliest tokens only; 0: all
    top_p: float = 1.0  # choose among the fewest likeliest tokens whose probabilities reach this sum; 1: all
    stop: str = ""  # end a sample before this text
    seed: int = 1337  # same seed, same samples

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, num_samples=1)
        if self.num_samples > 100_000:  # all of them are kept in memory
            raise UserError(f"num_samples = {self.num_samples}: must be at most 100,000")
        check_drawing(self)


@dataclass(frozen=True)
class Looking(Nothing):
    # where it looks
    attention: str = ""  # a .png or .jpg to write: where each token looks, in the text or in a translator's source
    attention_layer: int = 0  # draw one block, counted from 1; 0: the mean of all
    attention_head: int = 0  # draw one head, counted from 1; 0: the mean of all
    attention_each: bool = False  # draw each of these blocks and heads by itself, in small maps, instead of the mean

    def __post_init__(self):
        super().__post_init__()  # of Writing, in Chatting
        check_ranges(self, attention_layer=0, attention_head=0)
        if self.attention:
            check_picture(self, "attention")
        else:
            check_idle(self, "is for --attention=FILE", "attention_layer", "attention_head", "attention_each")


@dataclass(frozen=True)
class Chatting(Looking, Writing):
    # the dialogue
    chat: bool = False  # hold a conversation: answer each line of standard input; /reset forgets, Ctrl-D ends
    system: str = ""  # a system message before the dialogue

    def __post_init__(self):
        super().__post_init__()
        if self.chat and self.num_samples > 1:
            raise UserError(f"num_samples = {self.num_samples}: a conversation has one answer at a time; leave it out")
        if self.attention and (self.chat or self.num_samples > 1):
            raise UserError(f"attention = {self.attention}: shows one text: leave out --chat and --num_samples")


def image_files(image):
    """The list of paths in --image, which are separated by commas; a file whose own name has commas is one path."""
    return [image] if os.path.isfile(image) else image.split(",")


@dataclass(frozen=True)
class Answering(Writing):
    # the image
    image: str = ""  # an image file, or several separated by commas: each gets the prompt
    draw: str = ""  # a .png or .jpg to write: the image with the boxes of the answer
    attention: str = ""  # a .png or .jpg to write: for each token of the answer, where in the image the model looked

    def __post_init__(self):
        super().__post_init__()
        for name in ("draw", "attention"):
            path = getattr(self, name)
            check_picture(self, name)
            many = len(image_files(self.image)) > 1 or self.num_samples > 1
            if path and (not self.image or many):
                raise UserError(f"{name} = {path}: needs one --image and --num_samples=1")


def check_picture(settings, name):
    """Raises UserError if the setting `name` is not empty and can't be a picture to write."""
    path = getattr(settings, name)
    if path and not path.lower().endswith((".png", ".jpg", ".jpeg")):
        raise UserError(f"{name} = {path}: must end in .png or .jpg")
    if os.path.isdir(path):
        raise UserError(f"{name} = {path}: is a folder; name a file")


@dataclass(frozen=True)
class Matching(Nothing):
    # the image
    image: str = ""  # an image file, or several separated by commas: each is compared with the captions in --prompt


@dataclass(frozen=True)
class Seeing(Nothing):
    # the image
    image: str = ""  # an image file, or several separated by commas

    def __post_init__(self):
        super().__post_init__()
        if hasattr(self, "prompt"):  # from a command line
            check_idle(self, "this model reads images alone", "prompt")


@dataclass(frozen=True)
class Recognising(Seeing):
    # the answers
    top: int = 3  # how many of the likeliest classes to show; 0: all
    attention: str = ""  # a .png or .jpg to write: how much of each part of the image reached the answer by attention

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, top=0)
        check_picture(self, "attention")
        if self.attention and len(image_files(self.image)) > 1:
            raise UserError(f"attention = {self.attention}: needs one --image")


@dataclass(frozen=True)
class Guessing(Seeing):
    draw: str = ""  # a .png or .jpg to write: for each image what the model saw, its guess, and the whole image
    seed: int = 1337  # decides which patches are hidden

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, seed=0)
        check_picture(self, "draw")


@dataclass(frozen=True)
class Scoring(Nothing):
    # the answer
    answer: str = ""  # the answer to the prompt, which gets a score

    def __post_init__(self):
        super().__post_init__()
        if not self.answer:
            raise UserError("answer = '': a reward model scores an answer to the prompt: add --answer=TEXT")


@dataclass(frozen=True)
class Translating(Looking):
    # the translations
    beam: int = 1  # translations kept at each step; 1: no search, but the likeliest token, or a drawn one
    length_penalty: float = 0.6  # with a beam: 0 ranks by the sum of log-probabilities; above 0 favours long ones
    n_best: int = 1  # with a beam: how many translations to show, each with its score
    temperature: float = 0.0  # 0 takes the likeliest token; above, tokens are drawn: below 1 is safer, above 1 wilder
    top_k: int = 0  # draw among the k likeliest tokens only; 0: all
    top_p: float = 1.0  # draw among the fewest likeliest tokens whose probabilities reach this sum; 1: all
    seed: int = 1337  # same seed, same drawn tokens
    max_new_tokens: int = 500  # most tokens of a translation, which also ends at the model's block_size
    show_steps: bool = False  # first show each token as it comes, with its probability and the likeliest tokens

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, n_best=1)
        check_drawing(self)
        check_beam(self, "n_best")
        if self.n_best > self.beam:
            raise UserError(f"n_best = {self.n_best}: is above beam = {self.beam}; add --beam={self.n_best}")
        if self.beam > 1:
            check_idle(self, "a beam search draws nothing, and has no single steps", "temperature", "show_steps")


@dataclass(frozen=True)
class Filling(Looking):
    # the answers
    top: int = 5  # how many of the likeliest tokens to show for each [MASK]; with --rank, how many texts; 0: all
    rank: str = ""  # FILE:path, a file of texts, one per line: show those whose vectors are most like the prompt's

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, top=0)
        if self.rank and not self.rank.startswith("FILE:"):
            raise UserError(f"rank = {self.rank}: names a file of texts, such as --rank=FILE:{self.rank}")
        if self.attention and self.rank:
            raise UserError(f"attention = {self.attention}: shows one text, and --rank compares many; leave one out")


@dataclass(frozen=True)
class Classifying(Looking):
    # the answers
    top: int = 3  # how many of the likeliest labels to show; 0: all

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, top=0)


@dataclass(frozen=True)
class Predicting(Classifying):
    # the row
    row: str = ""  # a row as JSON, such as '{"age": 29}', or FILE:path of a table; what a row lacks is missing

    def __post_init__(self):
        super().__post_init__()
        if hasattr(self, "prompt"):  # from a command line
            check_idle(self, "this model reads rows of a table: use --row", "prompt")
        if self.row.startswith("FILE:"):
            if not os.path.isfile(self.row.removeprefix("FILE:")):
                raise UserError(f"row = {self.row}: there is no such file")
        elif not is_object(self.row):
            raise UserError(f"""row = {self.row!r}: must be an object in JSON, such as --row='{{"age": 29}}', or a"""
                            " table, such as --row=FILE:rows.csv")


def is_object(text):
    """Whether a text is a JSON object."""
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


@dataclass(frozen=True)
class Asking(Looking):
    # the text
    context: str = ""  # the text with the answer; FILE:path reads a file
    no_answer_threshold: float = 0.0  # no answer if its score exceeds the best one's by more; 1000: always an answer

    def __post_init__(self):
        super().__post_init__()
        if not self.context.strip():
            raise UserError("context = '': this model finds answers in a text: add --context=FILE:page.txt, or"
                            " --context=TEXT")
        if self.context == "-" or os.path.isfile(self.context):
            path = "/dev/stdin" if self.context == "-" else self.context
            raise UserError(f"context = {self.context}: is no text: to read that file, add --context=FILE:{path}")


def check_beam(settings, *names):
    """Raises UserError for a bad beam or length_penalty, or for one of `names` where there is no beam."""
    check_ranges(settings, beam=1, length_penalty=0.0)
    if settings.beam == 1:
        check_idle(settings, "is for --beam above 1", "length_penalty", *names)


# ----------------------------------------------------------------------------------------------------------------------
# For evaluate.py, joined with evaluate.Settings

@dataclass(frozen=True)
class Windows(Nothing):
    # the estimate from random windows
    random_windows: int = 200  # batches of random windows; 0: no estimate
    batch_size: int = 64  # windows per batch
    seed: int = 1337  # decides where the windows are

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, random_windows=0, batch_size=1, seed=0)
        if not self.random_windows:
            check_idle(self, "is for --random_windows above 0", "batch_size", "seed")


@dataclass(frozen=True)
class Tested(Nothing):
    # what is scored
    test: bool = False  # also score the second held-out part, which no choice was made on: once, at the very end


@dataclass(frozen=True)
class Questions(Tested):
    no_answer_threshold: float = 0.0  # no answer if its score exceeds the best one's by more; 1000: always an answer


@dataclass(frozen=True)
class Translations(Tested):
    # the translations, which are greedy or the best of a beam
    beam: int = 1  # translations kept at each step; 1: the likeliest token at each
    length_penalty: float = 0.6  # with a beam: 0 ranks by the sum of log-probabilities; above 0 favours long ones

    def __post_init__(self):
        super().__post_init__()
        check_beam(self)


@dataclass(frozen=True)
class Labels(Tested):
    picture: str = ""  # a .png or .jpg to write: which label was taken for which; with --test also NAME_test

    def __post_init__(self):
        super().__post_init__()
        check_picture(self, "picture")


@dataclass(frozen=True)
class Answers(Tested):
    # the answers, if a world can check them
    samples: int = 8  # how many answers to draw for each problem, at temperature 1
    reward: str = ""  # the folder of a reward run: also count the problems whose best sample, by its scores, is right
    seed: int = 1337  # same seed, same samples

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, samples=1, seed=0)
