"""minilm: a readable reference implementation of efficient language-model adaptation.

Importing it loads nothing: import its modules. `python -m minilm` prints what this machine has.
The floors, in reading order. A module imports only from its own line and the lines before it:

  shell extras backend arrays blas vectors cuda locks strict files tensorfiles stored together
    ranges
  graph tensor activations heads attention losses ops         functions, each with its gradient
  rope config inputs nn block transformer seq2seq shapes cache decode generate dialogue
  quantize peft optim parallel distill align            the methods
  data interop measure lessons                          text, others' formats, numbers
  checkpoint records state versions train adapting picture results run loop command experiment
    rewards asking aligning continued trial tables trained stages ranks joining launch new
    lectures wholerun
"""

__version__ = "1.0.0"
