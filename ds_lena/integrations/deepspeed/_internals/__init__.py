"""The only folder that spells private DeepSpeed names or patches DeepSpeed. One file for the engine, one per wrapper.

`tests/integrations/test_deepspeed_private.py` pins every name used here.
"""

SEEN_WITH = "0.19.8"
"""The DeepSpeed version with which every name in this folder was checked."""
