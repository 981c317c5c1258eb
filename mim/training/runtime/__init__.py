"""What a run needs of the machine: processes, sharding, precision, devices, trackers.

Nothing here knows what is trained. Start reading in ``processes.py``.
"""
