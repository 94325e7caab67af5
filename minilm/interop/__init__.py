"""Other libraries' files: Hugging Face models, PEFT adapters, bitsandbytes' 4 and 8 bits.

Only formats are here: files become modules and arrays of the floors below, and are written from
them.
"""

from minilm.interop.folder import base_of, load_adapter, load_model, save_adapter, save_model
from minilm.interop.shards import require_folder

__all__ = [
    "base_of", "load_adapter", "load_model", "require_folder", "save_adapter", "save_model",
]
