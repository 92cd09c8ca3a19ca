"""From a file of rows to batches of token ids.

readers                  rows of a file, a saved or a hub data set
formats, conversations   what the rows' columns mean
examples                 a row as an example
tasks                    a task's train and test rows, labels and metric
rendering, controls      a conversation as token ids, and which of them are trained
packing                  steps, micro-batches, tensors; rows that are too long
checking                 all of it counted, before training
memory, coresets         old rows within limits, and which of them are kept
mixing                   new rows and old ones in one epoch
"""

__all__: list[str] = []
