"""Find, see and edit multi-modal neurons in vision-language models.

import mmn
vlm = mmn.load("llava-hf/llava-1.5-7b-hf")        # any Hugging Face vision-language model, or, for drawn scenes, tiny-llava
trace = vlm.caption(mmn.open_image("dog.jpg"))    # the caption, and every neuron's activation at each step
ranking = mmn.rank(vlm, trace, "dog")             # the neurons that voted for the word
mmn.top_tokens(vlm, ranking.neurons)              # the words these neurons write
mmn.heatmap(vlm, trace, ranking.neurons)          # where in the picture they fire
with mmn.zero(vlm, ranking.neurons):              # what happens without them
    vlm.caption(trace.image)
"""

import lazy_loader

# What the package gives is listed in __init__.pyi, and imported when it is first used: torch and transformers take seconds, which
# a command that only prints its help need not wait for.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
