"""What trains: the loop, its schedule, its hooks, its files.

Nothing here measures an encoder. Start reading in ``pretrain.py``.
"""
