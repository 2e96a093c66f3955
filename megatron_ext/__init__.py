"""Pretraining of discrete diffusion language models on megatron-core."""

import logging
import warnings

# megatron-core says on every start which optional packages it did not find and which of torch's
# functions will be renamed; what a run uses is reported by the run itself.
logging.getLogger("megatron.core").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"megatron\.core")
warnings.filterwarnings("ignore", message=r"Please use DTensor instead")
warnings.filterwarnings("ignore", message=r".*torch\.distributed\.\w+. is deprecated")
