"""Token files, the order in which they are read, and the batches made of them.

``prepare`` turns text into a Megatron ``.bin/.idx`` pair, ``dataset`` opens a weighted blend of such pairs,
``loader`` hands out batches. Only ``loader`` imports torch.
"""
