"""The newcomer's run: real media to an exported tiny GLM-V in minutes. `python -m demo`, or `make demo`.

Everything that only the demo needs lives here: its media, data recipe, tokenizer, evaluation and report. The tests use
the data and the tokenizer; no other package imports this one.
"""
