"""The only folder that uses private names of DeepSpeed, or patches it. Each optimizer wrapper has a file.

`tests/integrations/test_deepspeed_private.py` tests every name used here. `test_still_so.py` beside it tests the faults
of DeepSpeed that are worked around.
"""

SEEN_WITH = "0.19.8"
"""The DeepSpeed version that this folder was tested with."""
