"""minilm: a readable reference implementation of efficient language-model adaptation.

Importing it loads nothing: import its modules. `python -m minilm` says what this machine has.
In reading order, each floor only on those before it:

    backend, blas, cuda, files                      arrays on a CPU or a GPU, files
    graph, tensor, attention, activations, ops      functions, each with its gradient
    nn, transformer, decode, generate               one model, three families
    quantize, peft, optim, distill                  the methods
    data, interop, measure                          text to batches, others' files, bytes of a step
    parallel, train, checkpoint, run, loop          steps, evaluation, runs that can be resumed
"""

__version__ = "0.1.0"
