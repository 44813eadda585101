"""Small networks, one for each construct that the engine must prune or lock.

``NETWORKS[name]`` is ``(factory, example_inputs, expect)``: a function that builds the network, a function that builds
its example inputs (a tensor, a tuple of them, or a dict for keyword arguments), and what must become of it.
"""

from __future__ import annotations

from networks.architectures import ARCHITECTURES
from networks.attention import ATTENTION, CONTRACTIONS, GATES, LOCKED
from networks.common import Expect, Inputs, Network, randomise
from networks.convolutions import CONVOLUTIONS
from networks.corners import CORNERS
from networks.interfaces import INTERFACES
from networks.movement import MOVEMENT
from networks.norms import NORMS
from networks.parameters import PARAMETERS

NETWORKS: dict[str, Network] = {
    **CONVOLUTIONS,
    **NORMS,
    **PARAMETERS,
    **MOVEMENT,
    **GATES,
    **CONTRACTIONS,
    **ATTENTION,
    **LOCKED,
    **ARCHITECTURES,
    **INTERFACES,
    **CORNERS,
}

VARIANTS: frozenset[str] = frozenset(
    """
    conv_batch_of_one conv_grouped_in_a_row padding_circular padding_replicate padding_same constant_pad bilinear_layer
    linear_without_batch_norm batch_norm_of_nothing batch_norm_plain batch_norm_before_conv layer_norm_plain
    layer_norm_without_bias group_norm_plain instance_norm_affine rezero parameter_over_space parameter_indexed
    parameter_halves parameter_bag buffer_scale cat_then_add stack_maximum split_with_rest chunk_uneven tensor_split
    narrow unbind_of_view index_with_repeats flip_space roll_space swap_halves shuffle_by_module shuffle_by_index
    pad_channels view_linear linear_to_map_by_module expand_one_channel where_scalar masked_fill boolean_of_space
    log_softmax_over_channels sort_channels cumsum_over_channels gram_as_map res2net_uneven_tail ghost_odd repvgg
    layer_scale_chain outputs_list outputs_nested inputs_siamese inputs_optional_left_out unused_module orthogonal
    weights_added weights_stacked_on_inputs weight_turned weight_normalised_by_hand attention_causal
    attention_own_scale unrolled einsum_ellipsis einsum_diagonal sum_of_all gathered_positions clamped_by_channel
    recurrent distances grid_sampled largest_positions square_of_channels flattened_with_steps weights_concatenated
    view_mixes_rows_into_channels train_and_eval_differ rewritten_dropouts rewritten_instance_norm_tracking tied_decoder
    perceptron dilated_strided stack_interleaved flatten_last_linear unet_add non_local roll_of_everything
    one_map_for_all normalised_by_maximum chunks_multiplied batch_mixed transposed_space_and_channels
    """.split()
)
"""Close relatives of others, which only the slow run visits: capturing a network takes a third of a second."""

__all__ = ["NETWORKS", "VARIANTS", "Expect", "Inputs", "Network", "randomise"]
