"""Models, parallel state, training steps and checkpoints on real megatron-core; besides train/ nothing imports it."""

import warnings

from tawin_nemo.models.megatron.parallel import first_import

first_import.install()
# Without Transformer Engine and Apex every megatron module says so at import; torch's own kernels are meant here.
warnings.filterwarnings("ignore", message=r".*(Transformer Engine|Apex|apex|full scope).*", module=r"megatron\..*")
warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(megatron|torch\.jit)\..*")
# megatron-core 0.16 calls collectives by names that torch is renaming, and reads .grad of views.
warnings.filterwarnings("ignore", category=FutureWarning, message=r".*torch\.distributed\..*is deprecated.*")
warnings.filterwarnings(
    "ignore", message=r".*(\.grad attribute of a Tensor that is not a leaf|requires_grad=True to a scalar).*"
)
warnings.filterwarnings(
    "ignore", category=FutureWarning, message=r".*(`load_state_dict` is deprecated|DTensor instead).*"
)
