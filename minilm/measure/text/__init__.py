"""How good answers are, judged by texts that are right: one metric a file.

| file | metric | top | of a corpus it is | several right texts |
|---|---|---|---|---|
| bleu.py | BLEU | 1 | one ratio of sums | pooled: the largest count of each n-gram |
| nist.py | NIST | none | a sum of ratios of sums | pooled; the mean length |
| meteor.py | METEOR | below 1 | the mean of the answers' | the best one |
| rouge.py | ROUGE-1, -2, -L | 1 | the mean | the best one; COCO's L: see there |
| cider.py | CIDEr-D | 10 | the mean | the mean over them |
| agreement.py | accuracy, Matthews, Pearson | 1 | as defined | accuracy: any of them |
| perplexity.py | perplexity | from 1 up | exp of a ratio of sums | the output alone |

All but perplexity are better if they are higher. Each file has

    per_example(answers, references)   a row of numbers for each example, (S, K)
    of_sums(sums)                      the score, from the sums (K,) of these rows over examples

and the two together under the metric's name. So a score of other examples, such as those that
bootstrap.py draws, costs one sum. tokens.py cuts texts into tokens: what the metrics take, but for
accuracy. scores.py has all of them that fit some answers.
"""
