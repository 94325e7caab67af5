"""Other libraries' files: Hugging Face models, PEFT adapters, bitsandbytes' 4-bit tensors.

Only formats are here: files become modules and arrays of the floors below, and are written from
them.
"""
