"""minilm: a readable reference implementation of efficient language-model adaptation.

Reading order: tensor, ops, nn, transformer, generate, optim, train; then one file a technique.
"""

__version__ = "0.1.0"
