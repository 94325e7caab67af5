"""Other libraries' files: Hugging Face models, PEFT adapters, bitsandbytes' 4-bit tensors.

Formats only: what is read here becomes modules and arrays of the floors below, and the other way.
"""
