"""Publishes a finished run: writes its model, LoRA merged, into a folder that other programs can load.

    python -m tools.publish --out_dir=out --to=shakespeare                                the run's best checkpoint
    python -m tools.publish --out_dir=out --to=shakespeare --checkpoint=last --dtype=bfloat16

In Python, transformers.AutoModelForCausalLM.from_pretrained("shakespeare") and AutoTokenizer load it; here,
--init_from=shakespeare does. A GPT with learned positions and LayerNorm goes out as a GPT-2, one with rotary positions,
an RMSNorm and a gated MLP as a Llama, a PaliGemma as a PaliGemma. A masked model of --block=post goes out as a BERT,
for transformers.AutoModelForMaskedLM, and one that finds answers for AutoModelForQuestionAnswering, if it has BERT's
tokenizer. A classifier of images with --pool=first goes out as a ViT, for AutoModelForImageClassification and
AutoImageProcessor. The folder must be new or empty, or hold a published model, which is replaced.
train.py does the same at the end of a run that has --publish=FOLDER.
"""

from dataclasses import dataclass
from typing import Literal

from configurator import UserError, check_run, from_command_line, one_line_errors
from published import check_publish
from tasks.settings import check_model


@dataclass(frozen=True)
class Settings:
    out_dir: str = "out"  # the folder of a run, or of one checkpoint
    checkpoint: Literal["best", "last"] = "best"  # which checkpoint of the run: best or last
    to: str = ""  # the folder to write
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # number format of the weights in the file

    def __post_init__(self):
        if not self.to:
            raise UserError("name the folder to write: --to=FOLDER")
        check_run(self.out_dir)
        check_model(self)
        check_publish(self.to, self.out_dir, setting="to")


if __name__ == "__main__":  # --help and typos answer before torch is imported
    SETTINGS, _ = from_command_line(Settings, __doc__)

import torch

from tasks.loading import publish


def main(settings):
    publish(settings.out_dir, settings.to, settings.checkpoint, getattr(torch, settings.dtype))


if __name__ == "__main__":
    with one_line_errors():
        main(SETTINGS)
