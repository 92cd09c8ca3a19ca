"""From a file of rows to batches of token ids: readers, formats, tasks, rendering, packing, and their check."""
