"""Flags of Megatron that describe models or kernels which the modules here do not have."""

from megatron_dip.families.flags.groups import LEAVE_OUT, FlagGroup, refused

__all__ = ["REFUSED_MODELS"]


REFUSED_MODELS: tuple[FlagGroup, ...] = (
    refused(
        "Attention",
        f"the modules have plain attention inside each sample, as the file states it; {LEAVE_OUT}",
        "kv_channels window_size window_attn_skip_freq softmax_type attention_output_gate "
        "qk_layernorm qk_l2_norm qk_clip qk_clip_alpha qk_clip_threshold log_max_attention_logit "
        "apply_wd_to_qk_layernorm no_weight_decay_cond_type flash_attention_version "
        "use_kitchen_attention kitchen_attention_backend batch_invariant_mode",
        softmax_type=("vanilla",),
    ),
    refused(
        "Old names of attention kernels",
        "nothing reads it; use --attention-backend flash",
        "use_flash_attn",
    ),
    refused(
        "Latent, sparse and linear attention",
        f"the modules have plain attention; {LEAVE_OUT}",
        "multi_latent_attention q_lora_rank kv_lora_rank qk_head_dim qk_pos_emb_head_dim "
        "v_head_dim rotary_scaling_factor mscale mscale_all_dim cache_mla_latents "
        "mla_down_proj_fusion experimental_attention_variant dsa_indexer_n_heads "
        "dsa_indexer_head_dim dsa_indexer_topk dsa_indexer_topk_freq dsa_indexer_skip_topk_offset "
        "dsa_indexer_loss_coeff dsa_indexer_use_sparse_loss dsa_kernel_backend "
        "dsa_indexer_rope_interleaved dsa_indexer_rotate_activation dsa_indexer_scoring_relu "
        "dsa_indexer_k_norm_epsilon dsa_indexer_k_norm_fp32 linear_conv_kernel_dim "
        "linear_key_head_dim linear_value_head_dim linear_num_key_heads linear_num_value_heads "
        "linear_attention_freq",
    ),
    refused(
        "Positions",
        "language has rotary positions over all channels of a head, with the rotary_base of the "
        f"file; {LEAVE_OUT}",
        "rotary_interleaved rotary_percent rotary_seq_len_interpolation_factor use_rope_scaling "
        "rope_scaling_factor no_rope_freq rope_type mrope_section add_position_embedding "
        "relative_attention_num_buckets relative_attention_max_distance "
        "yarn_original_max_position_embeddings yarn_beta_fast yarn_beta_slow "
        "yarn_correction_range_round_to_int",
        rotary_percent=(1.0,),
        rope_type=("rope",),
    ),
    refused(
        "Other layers",
        f"the layers are those that docs/integration.md names; {LEAVE_OUT}",
        "apply_residual_connection_post_layernorm layernorm_zero_centered_gamma glu_linear_offset "
        "activation_func_clamp_value openai_gelu squared_relu quick_geglu onnx_safe "
        "bert_binary_head use_fused_weighted_squared_relu fused_residual_rmsnorm "
        "use_transformer_engine_op_fuser use_te_activation_func use_grouped_gemm_for_dense_mlp "
        "mlp_chunks_for_prefill mlp_chunks_for_training clone_scatter_output_in_embedding "
        "fp16_lm_cross_entropy config_logger_dir",
    ),
    refused(
        "Other models",
        f"the file describes the model; {LEAVE_OUT}",
        "encoder_num_layers decoder_num_layers spec hybrid_layer_pattern hybrid_override_pattern "
        "is_hybrid_model mamba_state_dim mamba_head_dim mamba_num_groups mamba_num_heads "
        "use_mamba_mem_eff_path mamba_training_ssm_states_dtype mtp_num_layers "
        "mtp_loss_scaling_factor mtp_use_repeated_layer mtp_detach_heads "
        "mtp_hybrid_override_pattern mtp_standalone heterogeneous_layers_config_path "
        "heterogeneous_layers_config_encoded_json yaml_cfg use_checkpoint_args "
        "use_mp_args_from_checkpoint_args use_tokenizer_model_from_checkpoint_args",
        mtp_num_layers=(0,),
    ),
    refused(
        "Initial weights",
        f"they are drawn by parameter from --seed and do not depend on the cut; {LEAVE_OUT}",
        "perform_initialization init_method_xavier_uniform init_model_with_meta_device use_mup "
        "mup_width_mult mup_base_hidden_size mup_embedding_mult mup_output_mult mup_base_head_dim "
        "mup_attn_scale_power fp8_param_gather",
    ),
    refused(
        "8 and 4 bits by layer",
        f"all modules have one precision, --fp8-format or 16 or 32 bits; {LEAVE_OUT}",
        "fp8_quantizer_factory fp8_interval fp8_output_proj first_last_layers_bf16 "
        "num_layers_at_start_in_bf16 num_layers_at_end_in_bf16 fp4 fp4_recipe "
        "fp4_quantizer_factory fp4_param_gather te_precision_config_file kitchen_config_file "
        "kitchen_recipe_number",
    ),
    refused(
        "Experts whose use depends on packing",
        f"which tokens go where would depend on how a microbatch is packed; {LEAVE_OUT}",
        "moe_expert_capacity_factor moe_pad_expert_input_to_capacity moe_token_drop_policy "
        "moe_expert_rank_capacity_factor moe_input_jitter_eps",
    ),
    refused(
        "Bias of experts",
        "Megatron counts padding there; use --moe-aux-loss-coeff",
        "moe_router_enable_expert_bias moe_router_bias_update_rate "
        "moe_router_quantile_balancing_ema",
    ),
    refused(
        "Grouped experts",
        f"initial weights are drawn expert by expert; {LEAVE_OUT}",
        "moe_grouped_gemm moe_single_grouped_weight moe_single_grouped_bias",
    ),
    refused(
        "Layers without experts",
        f"all layers of a module have experts, or none; {LEAVE_OUT}",
        "moe_layer_freq",
        moe_layer_freq=(1,),
    ),
    refused(
        "Experts: what is not there",
        f"see Experts in docs/integration.md; {LEAVE_OUT}",
        "moe_use_upcycling moe_upcycling_granularity moe_shared_expert_overlap "
        "use_grouped_gemm_for_shared_expert moe_shared_expert_glu_interleave_size "
        "moe_mlp_glu_interleave_size moe_enable_routing_replay "
        "moe_router_padding_for_quantization moe_router_padding_for_fp8 "
        "moe_router_force_load_balancing moe_router_force_biased moe_enable_deepep "
        "moe_flex_dispatcher_backend moe_permute_fusion_into_hybridep "
        "moe_hybridep_pad_uneven_dispatch_inputs moe_latent_size moe_flex_dispatcher_num_sms "
        "moe_deepep_num_sms moe_hybridep_num_sms moe_hybridep_num_blocks_permute "
        "moe_hybridep_num_blocks_unpermute moe_hybridep_num_sms_preprocessing "
        "moe_ncclep_static_shape moe_ncclep_zero_copy moe_paged_stash moe_paged_stash_page_size "
        "moe_paged_stash_buffer_size_factor_cuda moe_paged_stash_buffer_size_factor_cpu "
        "moe_routing_trace_path moe_routing_trace_max_training_iters "
        "moe_routing_trace_capture_logits moe_routing_trace_capture_hidden_states "
        "moe_routing_trace_dump_weights save_tokens_per_expert_interval "
        "high_priority_a2a_comm_stream",
    ),
    refused(
        "Old name of recomputation in experts",
        "use --recompute-granularity selective --recompute-modules moe",
        "moe_layer_recompute",
    ),
)
