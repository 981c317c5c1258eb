"""The command line: ``main.py`` and the verbs.

A verb parses its options, calls one function of a room and shows what it returns. Start reading in
``main.py``.
"""
