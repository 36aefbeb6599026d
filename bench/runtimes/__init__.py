"""Ways to run one model: each file is one runtime behind the protocol in `protocol.py`."""
