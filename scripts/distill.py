"""Train a teacher, cut a student out of it, distil, and show what the student kept.

    python scripts/distill.py                                # about four minutes on two cores
    python scripts/distill.py --teacher runs/distill-1/teacher --sweep 1 2 4 8
    python scripts/distill.py --objective masked             # BERT, filling in masked tokens

The student has every other layer. It is trained four times on as many tokens: from the teacher's
weights or from random ones, by distillation or on the text's own tokens alone. Prints loss,
accuracy, size and speed of all five, and draws their curves and one prediction of the teacher at
three temperatures (needs the extra `plots`). --sweep distils at other temperatures too. Leaves a
run directory with teacher and student as Hugging Face folders.
"""

import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import tyro
from pretrain import make_model
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from minilm import data
from minilm.distill import Distillation, student_from_teacher
from minilm.generate import generate
from minilm.interop import huggingface
from minilm.optim import AdamW, cosine_schedule
from minilm.run import RunDirectory
from minilm.tensor import no_grad
from minilm.train import Diverged, Trainer, default_workers, train
from minilm.transformer import Transformer
