"""Importing this keeps torchao's messages about itself from a person who asked for none. No names; imported for that.

transformers imports torchao wherever it is installed, which then tells on stderr that kernels for other devices cannot
be loaded here, and that a call of its own will change some day.
"""

import logging

for _name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(_name).setLevel(logging.ERROR)
