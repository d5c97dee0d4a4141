"""DeepSpeed: process group, optimizer, engine and the state that it shards."""

import logging

# Every process that finds no GPU would say so in DeepSpeed's words; a run's first line names the
# device.
logging.getLogger("DeepSpeed").addFilter(
    lambda record: "Setting accelerator to CPU" not in record.getMessage()
)
