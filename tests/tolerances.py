"""Every tolerance of the suite, with its reason."""

#: float32 logits and scores of two implementations that sum in different orders; logits here are of the order of 1 to 10
LOGITS_ATOL = 1e-4
#: a mean over a few dozen tokens of such logits
LOSS_ATOL = 1e-4
#: encoder states are normed to the order of 1, several layers deep
HIDDEN_ATOL = 1e-4
