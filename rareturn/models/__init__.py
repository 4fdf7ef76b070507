"""Models. Importing this package keeps bitsandbytes from complaining about a CPU kernel that is not used here."""

import logging

# On processors with bf16 units bitsandbytes looks for a faster 4-bit kernel in the package `kernels` when it is imported,
# and warns where there is none. `loading` turns such kernels off: they would give other logits than other processors.
logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(
    lambda record: not record.getMessage().startswith("Failed to load CPU gemm_4bit_forward")
)
