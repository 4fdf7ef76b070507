"""Long-tail dialogue classification: what the scripts share."""

import logging

# transformers' Trainer and PEFT import bitsandbytes, which warns on processors with bf16 units that a package with a
# faster 4-bit CPU kernel is missing. Nothing here uses that kernel; see `models.loading`.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
