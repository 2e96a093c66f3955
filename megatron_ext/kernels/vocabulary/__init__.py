"""Losses over the vocabulary without a tensor of [tokens, vocabulary].

A loss here reads the logits of a token in at most three passes: softmax statistics, two sums of its
tail, and the gradient. `passes` are the interchangeable implementations of those passes,
`split_softmax` adds the ranks that split the vocabulary, `projection` the logits themselves.
"""
