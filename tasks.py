"""What can be trained. A task brings its data, its model, its batches and its measure; train.py brings the one loop.

The loop knows of a task: model, tokenizer, micro_batches(step, world), val_loss(world, dtype), tokens_per_update,
flops_per_update(), describe(), show(), name_batch(step), data_marks(), and the command to try what
was trained.
"""

import dataclasses
import math

import numpy as np
import torch

import checkpoint
import sample
import tokenizer as tokenizers
from batches import (
    Dataset,
    ImageTextDataset,
    encode_captions,
    encode_rows,
    gather,
    gather_captions,
    gather_rows,
    random_offsets,
    shuffled_rows,
)
from configurator import UserError
from evaluate import answer_loss, answers, pair_accuracy, split_loss
from model import GPT, GPTConfig, count_parameters, flops_per_token, init_weights
from prepare import locate
from vlm import (
    Gemma,
    GemmaConfig,
    PaliGemma,
    PaliGemmaConfig,
    SigLIP,
    SigLIPConfig,
    TextEncoderConfig,
    ViTConfig,
    init_parts,
)

SHAPE = ("n_layer", "n_head", "n_kv_head", "n_embd", "block_size", "bias")  # settings that a checkpoint's model decides
GPT_SHAPE = ("mlp", "positions", "tied", "bigrams")  # and those of a GPT alone


class Task:
    """What all tasks share: where the model comes from, and how a batch is divided.

    Raises UserError where the data, the settings and the model to start from don't belong together.
    """

    def __init__(self, settings, given, device, folder=None):
        self.settings, self.device = settings, device
        model_device = "cpu" if settings.shard else device  # a rank moves only its part of what is sharded
        self.load_data(locate(settings.dataset))
        if folder:
            self.model, its_tokenizer, config = checkpoint.load(folder, model_device, settings.dropout)
            if not tokenizers.same_vocabulary(self.tokenizer, its_tokenizer):
                raise UserError(f"{folder} has another tokenizer than the data set {settings.dataset} has now")
            if config.get("data", self.data_marks()) != self.data_marks():
                raise UserError(f"{folder} was trained on other data than the data set {settings.dataset} holds now:"
                                f" prepare it as it was, or start a new run with --init_from={settings.out_dir}")
        else:
            self.model = self.new_model(given, torch.Generator().manual_seed(settings.seed)).to(model_device)
        self.check()

    def data_marks(self):
        """What tells the data set from others: checksum and sizes, of its meta.json."""
        marks = ("sha256", "train_tokens", "val_tokens", "train_rows", "val_rows")
        return {name: self.dataset.meta[name] for name in marks if name in self.dataset.meta}

    def name_batch(self, step):
        """Which sequences the batch of update step + 1 is made of, in words."""
        return f"{self.rows_are} {', '.join(map(str, self.batch_rows(step)))}"

    def micro_batches(self, step, world):
        """This rank's share of the batch of update step + 1: the model's arguments and the weight of each micro-batch.

        The weights make the mean over ranks of the weighted losses the mean over the batch. Which sequences make up
        the batch, and what dropout does to each micro-batch, follows from (seed, step) alone.
        """
        s, n = self.settings, self.settings.gradient_accumulation_steps
        pieces = np.split(self.batch_rows(step), world.size * n)
        scored = [self.count_scored(rows) for rows in pieces]
        for piece in range(world.rank * n, (world.rank + 1) * n):
            if s.dropout:
                torch.manual_seed(int(np.random.SeedSequence((s.seed, step, piece)).generate_state(1, np.uint64)[0]))
            yield self.gather(pieces[piece]), scored[piece] * world.size / sum(scored)


class Text(Task):
    """Next-token prediction on a text: a GPT, new or published."""

    command = "python sample.py --out_dir={out_dir}"
    rows_are = "the windows at the training tokens"

    def load_data(self, folder):
        self.dataset = Dataset(folder)
        self.tokenizer = tokenizers.load(folder / "tokenizer.json")

    def new_model(self, given, generator):
        s = self.settings
        if s.init_from == "scratch":
            kinds = {"gpt": (GPT, GPTConfig, GPT_SHAPE), "gemma": (Gemma, GemmaConfig, ())}
            cls, config_cls, more = kinds[s.architecture]
            shape = {name: getattr(s, name) for name in (*SHAPE, *more, "dropout")}
            model = cls(config_cls(**shape, vocab_size=self.tokenizer.vocab_size))
            init_weights(model, s.n_layer, generator, zero=s.zero_init)
            return model
        model, its_tokenizer = checkpoint.load_initial(s.init_from, self.device, given.get("block_size", 0), s.dropout)
        for name in (*SHAPE, *GPT_SHAPE):
            if name in given and given[name] != (its := getattr(model.config, name, None)):
                raise UserError(f"{name} = {given[name]!r}, but {s.init_from} has {its!r}: leave it out")
        if not tokenizers.same_vocabulary(self.tokenizer, its_tokenizer):
            raise UserError(f"the data set {s.dataset} was not made with the tokenizer of {s.init_from}:"
                            " prepare it with that one")
        return model

    def check(self):
        self.block_size = self.model.config.block_size
        self.tokens = {split: self.dataset.tokens(split, self.block_size) for split in ("train", "val")}
        self.tokens_per_update = self.settings.batch_size * self.block_size

    def batch_rows(self, step):
        return random_offsets(len(self.tokens["train"]), self.block_size, self.settings.batch_size, self.settings.seed,
                              step)

    def count_scored(self, rows):
        return len(rows) * self.block_size

    def gather(self, rows):
        return gather(self.tokens["train"], rows, self.block_size, self.device)

    def val_loss(self, world, dtype):
        return split_loss(self.model, self.tokens["val"], self.block_size, world, dtype, self.settings.eval_tokens)[0]

    def flops_per_update(self):
        return self.tokens_per_update * flops_per_token(self.model, self.block_size)

    def describe(self):
        n, s = len(self.tokens["train"]), self.settings
        return (f"model: {count_parameters(self.model) / 1e6:.2f}M parameters; data: {n:,} tokens of {s.dataset};"
                f" {self.tokens_per_update:,} tokens per update, {s.max_iters} updates ="
                f" {self.tokens_per_update * s.max_iters / n:.1f} epochs\n"
                f"a loss of {math.log(self.model.config.vocab_size):.4f} is guessing")

    def show(self):
        """A sample of what the model writes by now."""
        wanted = sample.Settings(max_new_tokens=self.settings.sample_tokens, seed=self.settings.seed)
        return sample.continuations(self.model.eval(), self.tokenizer, "", wanted)[0]


class Images(Task):
    """What the tasks with images share: a data set of images with text, and a vision tower."""

    rows_are = "the rows of the training split"

    def load_data(self, folder):
        self.dataset = ImageTextDataset(folder)
        self.tokenizer = tokenizers.load(folder / "tokenizer.json")

    def vision_config(self):
        return ViTConfig(**dataclasses.asdict(self.settings.vision), image_size=self.dataset.image_size)

    def check(self):
        vision = self.model.config.vision
        if vision.image_size != self.dataset.image_size:
            raise UserError(f"the images of {self.settings.dataset} have {self.dataset.image_size} pixels, and the"
                            f" model sees {vision.image_size}: prepare them with --image_size={vision.image_size}")
        self.data = {split: self.encode(self.dataset.rows[split]) for split in ("train", "val")}
        self.n_patches, self.n_tokens = vision.n_patches, self.data["train"].ids.shape[1]
        self.tokens_per_update = self.settings.batch_size * (self.n_patches + self.n_tokens)

    def batch_rows(self, step):
        return shuffled_rows(len(self.data["train"].images), self.settings.batch_size, self.settings.seed, step)

    def describe(self):
        n, s = len(self.data["train"].images), self.settings
        return (f"model: {count_parameters(self.model) / 1e6:.2f}M parameters, {self.n_patches} image tokens; data:"
                f" {n:,} rows of {s.dataset}; {s.max_iters} updates = {s.batch_size * s.max_iters / n:.1f} epochs")


class Contrastive(Images):
    """Images and captions, each told from all others: a SigLIP."""

    command = "python train.py config/vlm_shapes.py --init_vision={out_dir}"
    rows_are = "the captions of the training split, counted by image,"

    def encode(self, rows):
        return encode_captions(rows, self.tokenizer)

    def new_model(self, given, generator):
        s = self.settings
        if s.init_from != "scratch" or s.gradient_accumulation_steps != 1:
            raise UserError("the contrastive task starts from scratch, and a batch can't be divided, for each pair is"
                            " scored against all others: leave out --init_from and --gradient_accumulation_steps")
        text = TextEncoderConfig(n_layer=s.n_layer, n_head=s.n_head, n_embd=s.n_embd, block_size=s.block_size,
                                 vocab_size=self.tokenizer.vocab_size)
        model = SigLIP(SigLIPConfig(self.vision_config(), text, s.pair_loss, s.dropout))
        init_parts(model, generator)
        return model

    def check(self):
        super().check()
        longest = max(data.ids.shape[1] for data in self.data.values())
        if longest > self.model.config.text.block_size:
            raise UserError(f"block_size = {self.model.config.text.block_size}: the longest caption of"
                            f" {self.settings.dataset} has {longest} tokens")

    def count_scored(self, rows):
        return len(rows)

    def gather(self, rows):
        return gather_captions(self.dataset.images, self.data["train"], rows, self.device)

    def val_loss(self, world, dtype):
        return pair_accuracy(self.model, self.dataset, self.data["val"], self.settings.batch_size, self.device,
                             dtype)["loss"]

    def flops_per_update(self):
        text = self.model.text
        per_caption = self.n_tokens * (flops_per_token(text, self.n_tokens) - 6 * text.wte.weight.numel())
        per_image = self.n_patches * flops_per_token(self.model.vision, self.n_patches)
        return self.settings.batch_size * (per_image + per_caption)

    def show(self):
        found = pair_accuracy(self.model.eval(), self.dataset, self.data["val"], self.settings.batch_size, self.device,
                              torch.float32)
        return "\n".join(f"{name:28} {value:.4f}" for name, value in found.items())


class ImageText(Images):
    """Answers to prompts about images: a PaliGemma, new or published."""

    command = 'python sample.py --out_dir={out_dir} --image=FILE --prompt="caption" --temperature=0'

    def encode(self, rows):
        return encode_rows(rows, self.tokenizer)

    def new_model(self, given, generator):
        s = self.settings
        if s.init_from != "scratch":
            model, self.tokenizer = checkpoint.load_initial(s.init_from, self.device, 0, s.dropout)
            if not isinstance(model, PaliGemma):
                raise UserError(f"init_from = {s.init_from}: is no PaliGemma, which the image-text task trains")
            if s.lora_rank:
                model.add_lora(s.lora_rank, generator)
            return model
        text = GemmaConfig(**{name: getattr(s, name) for name in SHAPE}, vocab_size=self.tokenizer.vocab_size)
        model = PaliGemma(PaliGemmaConfig(self.vision_config(), text, s.dropout))
        init_parts(model, generator)
        if s.init_vision:
            siglip, _, _ = checkpoint.load(checkpoint.find_any(s.init_vision))
            self.copy_part("init_vision", getattr(siglip, "vision", None), model.vision)
        if s.init_decoder:
            decoder, its_tokenizer, _ = checkpoint.load(checkpoint.find_any(s.init_decoder))
            self.copy_part("init_decoder", getattr(decoder, "transformer", None), model.decoder.transformer)
            self.copy_embeddings(decoder.wte.weight, its_tokenizer, model.decoder.wte.weight)
        return model

    def copy_part(self, setting, theirs, ours):
        """Fills our part of the model with theirs. Raises UserError unless they have the same shape."""
        wanted, found = ({name: p.shape for name, p in part.named_parameters()} if part else None
                         for part in (ours, theirs))
        if wanted != found:
            raise UserError(f"{setting} = {getattr(self.settings, setting)}: its model has another shape than this"
                            " run's: give both the same sizes")
        ours.load_state_dict(theirs.state_dict())

    @torch.no_grad()
    def copy_embeddings(self, theirs, its_tokenizer, ours):
        """Tokens that stand for the same text in both vocabularies start with the same vector."""
        known = {its_tokenizer.decode([i]): i for i in range(its_tokenizer.vocab_size)}
        for i in range(self.tokenizer.vocab_size):
            if (j := known.get(self.tokenizer.decode([i]))) is not None:
                ours[i] = theirs[j]

    def check(self):
        super().check()
        if self.n_patches + self.n_tokens > self.model.config.block_size:
            raise UserError(f"block_size = {self.model.config.block_size}: {self.n_patches} image tokens and rows of up"
                            f" to {self.n_tokens} tokens need at least {self.n_patches + self.n_tokens}")
        self.row_tokens = self.n_patches + self.data["train"].lengths.mean()  # those that stand for something
        self.tokens_per_update = round(self.settings.batch_size * self.row_tokens)

    def count_scored(self, rows):
        data = self.data["train"]
        return int((data.lengths[rows] - data.prefix[rows]).sum())

    def gather(self, rows):
        return gather_rows(self.dataset.images, self.data["train"], rows, self.device)

    def val_loss(self, world, dtype):
        return answer_loss(self.model, self.dataset, self.data["val"], self.settings.batch_size, world, dtype,
                           self.settings.eval_tokens // self.n_tokens)

    def flops_per_update(self):
        """Of full training: what freezing saves is not deducted. Logits are computed of the answers alone."""
        vision, decoder, n = self.model.vision, self.model.decoder, self.row_tokens
        unscored = self.n_patches + self.data["train"].prefix.mean()
        per_row = n * flops_per_token(decoder, n) - 6 * unscored * decoder.wte.weight.numel()
        return self.settings.batch_size * (self.n_patches * flops_per_token(vision, self.n_patches) + per_row)

    def publish(self, folder):
        """Writes the run's best model into `folder` in the published layout, for transformers to load."""
        model, tokenizer, _ = checkpoint.load(checkpoint.find_any(self.settings.out_dir))
        if model.config.lora_rank:
            model.merge_lora()
        checkpoint.save_published(model, tokenizer, folder)

    def show(self):
        rows = self.dataset.rows["val"]
        rows = [rows[i] for i in range(0, len(rows), max(1, len(rows) // 10))][:10]
        found = answers(self.model.eval(), self.tokenizer, self.dataset, rows, self.device)
        return "\n".join(f"{row['prompt']} {answer}" + f"  (right: {row['answer']})" * (answer != row["answer"])
                         for row, answer in zip(rows, found))


TASKS = {"text": Text, "contrastive": Contrastive, "image-text": ImageText}
