"""minilm: a readable reference implementation of efficient language-model adaptation.

Importing it loads nothing: import its modules. `python -m minilm` says what this machine has.
In reading order, each floor only on those before it:

    backend, arrays, blas, cuda, files                    arrays on a CPU or a GPU
    graph, tensor, attention, activations, losses, ops    functions, each with its gradient
    nn, transformer, cache, decode, generate              one model, three families
    quantize, peft, optim, parallel, distill              the methods
    data, interop, measure                                text to batches, formats, bytes
    train, loop, command, checkpoint, run, experiment     steps, and runs that can be resumed
"""

__version__ = "0.1.0"
