# SPDX-License-Identifier: Apache-2.0
"""ComfyUI custom nodes: sample from several models at once, balanced by weights.

Install the package into ComfyUI's Python and link this folder into its custom nodes:

    pip install msdda-fast
    ln -s "$(python -c 'import msdda_fast.integrations.comfyui as c; print(c.__path__[0])')" \
        ComfyUI/custom_nodes/msdda_fast

One "MSDDA Objective" per model holds that model, its prompts, CFG, weight and eta; "MSDDA Guider"
takes two to six of them, and both of its outputs go into SamplerCustomAdvanced:

    MSDDA Objective x M -> MSDDA Guider -> guider, sampler -> SamplerCustomAdvanced

"MSDDA LoRA" makes stacks of LoRAs, which turn one model into several objectives. Importing this
module does not need ComfyUI.
"""

from msdda_fast.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
