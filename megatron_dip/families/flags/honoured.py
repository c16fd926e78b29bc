"""Flags of Megatron that a run with ``--dip-config`` may state, and who honours them."""

from megatron_dip.families.flags.groups import FlagGroup, Verdict, names

__all__ = ["HONOURED"]

HONOURED: tuple[FlagGroup, ...] = (
    FlagGroup(
        title="Parallel sizes and precision",
        verdict=Verdict.MODULES,
        reason="the same in all modules",
        destinations=names(
            "tensor_model_parallel_size pipeline_model_parallel_size sequence_parallel "
            "context_parallel_size cp_comm_type fp16 bf16 "
            "fp32_residual_connection attention_softmax_in_fp32 apply_query_key_layer_scaling "
            "fp8 fp8_recipe fp8_margin fp8_amax_history_len fp8_amax_compute_algo fp8_wgrad "
            "deterministic_mode"
        ),
    ),
    FlagGroup(
        title="Kernels",
        verdict=Verdict.MODULES,
        reason="the same in all modules",
        destinations=names(
            "transformer_impl attention_backend gradient_accumulation_fusion bias_swiglu_fusion "
            "bias_gelu_fusion bias_dropout_fusion masked_softmax_fusion no_persist_layer_norm "
            "apply_rope_fusion cross_entropy_loss_fusion cross_entropy_fusion_impl "
            "barrier_with_L1_time"
        ),
    ),
    FlagGroup(
        title="Recomputation",
        verdict=Verdict.MODULES,
        reason="the same in all modules, by the layers of a stage; not of a diffusion transformer",
        destinations=names(
            "recompute_granularity recompute_method recompute_num_layers recompute_modules "
            "recompute_activations distribute_saved_activations"
        ),
    ),
    FlagGroup(
        title="Dropout, norms and initial weights",
        verdict=Verdict.MODULES,
        reason="the same in all modules; a diffusion transformer and frozen text have no dropout",
        destinations=names(
            "hidden_dropout attention_dropout layernorm_epsilon init_method_std "
            "embedding_init_method_std use_cpu_initialization calculate_per_token_loss"
        ),
    ),
    FlagGroup(
        title="Experts",
        verdict=Verdict.EXPERTS,
        reason="how tokens are routed; see [Experts](integration.md#experts)",
        destinations=names(
            "expert_model_parallel_size expert_tensor_parallel_size moe_token_dispatcher_type "
            "moe_router_load_balancing_type moe_aux_loss_coeff moe_z_loss_coeff "
            "moe_router_score_function moe_router_pre_softmax moe_router_topk_scaling_factor "
            "moe_router_num_groups moe_router_group_topk moe_router_dtype moe_router_fusion "
            "moe_permute_fusion moe_apply_probs_on_input moe_shared_expert_gate "
            "moe_per_layer_logging"
        ),
        harmless={"expert_model_parallel_size": (1,)},
    ),
    FlagGroup(
        title="Shape of the model",
        verdict=Verdict.FILE,
        reason="the file states it",
        destinations=names(
            "num_layers hidden_size ffn_hidden_size num_attention_heads num_query_groups "
            "group_query_attention seq_length max_position_embeddings rotary_base "
            "position_embedding_type normalization swiglu add_bias_linear add_qkv_bias "
            "untie_embeddings_and_output_weights num_experts moe_router_topk "
            "moe_ffn_hidden_size moe_shared_expert_intermediate_size"
        ),
    ),
    FlagGroup(
        title="Tokens of the data",
        verdict=Verdict.FILE,
        reason="the file states it",
        destinations=names("vocab_size tokenizer_type dataloader_type"),
    ),
    FlagGroup(
        title="Placement of layers under Megatron's own schedule",
        verdict=Verdict.MEGATRON,
        reason="refused with --dip-schedule, see below",
        destinations=names(
            "decoder_first_pipeline_num_layers decoder_last_pipeline_num_layers "
            "account_for_embedding_in_pipeline_split account_for_loss_in_pipeline_split"
        ),
    ),
    FlagGroup(
        title="Batches and length of the run",
        verdict=Verdict.MEGATRON,
        reason="as always in Megatron",
        destinations=names(
            "micro_batch_size global_batch_size train_iters exit_interval exit_duration_in_mins "
            "exit_signal exit_signal_handler_for_training manual_gc manual_gc_interval "
            "manual_gc_eval empty_unused_memory_level train_sync_interval "
            "check_for_nan_in_loss_and_grad check_for_large_grads check_for_spiky_loss "
            "error_injection_rate error_injection_type log_straggler straggler_ctrlr_port "
            "straggler_minmax_count disable_straggler_on_startup "
            "check_weight_hash_across_dp_replicas_interval gpu_sniff_test_interval"
        ),
    ),
    FlagGroup(
        title="Loader and evaluation",
        verdict=Verdict.DATA,
        reason="as in Megatron where the loader here can; refused with the reason where not",
        destinations=names(
            "num_workers train_samples step_batch_size_schedule "
            "decrease_batch_size_if_needed eval_iters eval_interval start_eval_at_iter "
            "eval_global_batch_size eval_micro_batch_size skip_train full_validation "
            "phase_transition_iterations iterations_to_skip result_rejected_tracker_filename "
            "exit_signal_handler exit_signal_handler_for_dataloader"
        ),
    ),
    FlagGroup(
        title="Optimizer, learning rate and loss scale",
        verdict=Verdict.MEGATRON,
        reason="as always in Megatron; --optimizer adam, sgd or lion",
        destinations=names(
            "optimizer weight_decay clip_grad adam_beta1 adam_beta2 adam_eps sgd_momentum "
            "lion_beta1 lion_beta2 lr min_lr lr_decay_style lr_wsd_decay_style lr_decay_iters "
            "lr_decay_samples lr_wsd_decay_iters lr_wsd_decay_samples lr_warmup_fraction "
            "lr_warmup_iters lr_warmup_samples lr_warmup_init override_opt_param_scheduler "
            "use_checkpoint_opt_param_scheduler start_weight_decay end_weight_decay "
            "weight_decay_incr_style loss_scale initial_loss_scale min_loss_scale "
            "loss_scale_window hysteresis use_precision_aware_optimizer main_grads_dtype "
            "main_params_dtype exp_avg_dtype exp_avg_sq_dtype optimizer_cpu_offload "
            "optimizer_offload_fraction use_torch_optimizer_for_cpu_offload "
            "overlap_cpu_optimizer_d2h_h2d pin_cpu_grads pin_cpu_params "
            "dump_param_to_param_group_map optimizer_cuda_graph"
        ),
    ),
    FlagGroup(
        title="Learning rates of embeddings and heads",
        verdict=Verdict.MEGATRON,
        reason="as always in Megatron",
        destinations=names("decoupled_lr decoupled_min_lr"),
    ),
    FlagGroup(
        title="Gradients and data parallelism",
        verdict=Verdict.MEGATRON,
        reason="as always in Megatron",
        destinations=names(
            "accumulate_allreduce_grads_in_fp32 grad_reduce_in_bf16 overlap_grad_reduce "
            "overlap_param_gather use_distributed_optimizer num_distributed_optimizer_instances "
            "ddp_num_buckets ddp_bucket_size ddp_pad_buckets_for_high_nccl_busbw "
            "ddp_reduce_scatter_with_fp32_accumulation ddp_average_in_collective "
            "ddp_param_name_patterns_for_fp32_local_accumulation align_param_gather "
            "gradient_reduce_div_fusion reuse_grad_buf_for_mxfp8_param_ag nccl_ub "
            "disable_symmetric_registration create_all_gather_group"
        ),
    ),
    FlagGroup(
        title="Checkpoints",
        verdict=Verdict.MEGATRON,
        reason="as always in Megatron",
        destinations=names(
            "save save_interval save_retain_interval save_params_interval load "
            "load_main_params_from_ckpt non_persistent_save_interval non_persistent_ckpt_type "
            "non_persistent_global_ckpt_dir non_persistent_local_ckpt_dir "
            "non_persistent_local_ckpt_algo finetune pretrained_checkpoint ckpt_step "
            "exit_on_missing_checkpoint ckpt_format auto_detect_ckpt_format ckpt_convert_format "
            "ckpt_convert_save ckpt_convert_update_legacy_dist_opt_format "
            "ckpt_fully_parallel_save ckpt_fully_parallel_load "
            "ckpt_fully_parallel_load_exchange_algo ckpt_fully_parallel_save_process_group "
            "ckpt_fully_parallel_load_process_group ckpt_assume_constant_structure "
            "ckpt_load_validate_sharding_integrity async_save async_strategy "
            "use_persistent_ckpt_worker async_ckpt_cpu_priority async_ckpt_io_priority "
            "async_ckpt_use_cpu_shm dist_ckpt_strictness dist_ckpt_save_pre_mcore_014 "
            "dist_ckpt_optim_fully_reshardable distrib_optim_fully_reshardable_mem_efficient "
            "dist_ckpt_workers replication replication_jump replication_factor verify_integrity "
            "stream_ckpt_dequant no_save_optim no_save_rng no_load_optim no_load_rng "
            "override_ckpt_iteration"
        ),
    ),
    FlagGroup(
        title="Process groups and random numbers",
        verdict=Verdict.MEGATRON,
        reason="of Megatron's groups; those of plans are ours, see --dip-timeout-seconds",
        destinations=names(
            "distributed_backend distributed_timeout_minutes "
            "distributed_timeout_seconds_after_init local_rank nccl_communicator_config_path "
            "use_tp_pp_dp_mapping use_gloo_process_groups use_sharp sharp_enabled_group "
            "high_priority_stream_groups pipeline_model_parallel_comm_backend overlap_p2p_comm "
            "flight_recorder_dump_path flight_recorder_trace_buffer_size "
            "flight_recorder_dump_on_timeout flight_recorder_include_stack_trace "
            "flight_recorder_include_only_active flight_recorder_extra_dump_on_exec "
            "disable_jit_fuser seed te_rng_tracker data_parallel_random_init "
            "disable_bf16_reduced_precision_matmul"
        ),
    ),
    FlagGroup(
        title="Logs and profiles",
        verdict=Verdict.MEGATRON,
        reason="as always in Megatron",
        destinations=names(
            "log_interval log_params_norm log_throughput log_progress timing_log_level "
            "timing_log_option tensorboard_dir tensorboard_log_interval tensorboard_queue_size "
            "log_timers_to_tensorboard log_loss_scale_to_tensorboard "
            "log_validation_ppl_to_tensorboard log_memory_to_tensorboard log_memory_interval "
            "log_device_memory_used log_num_zeros_in_grad log_world_size_to_tensorboard "
            "wandb_project wandb_exp_name wandb_save_dir wandb_entity logging_level log_energy "
            "enable_one_logger one_logger_project one_logger_run_name one_logger_async "
            "app_tag_run_name app_tag_run_version profile profile_step_start profile_step_end "
            "use_pytorch_profiler pytorch_profiler_collect_shapes "
            "pytorch_profiler_collect_callstack pytorch_profiler_collect_chakra profile_ranks "
            "record_memory_history memory_snapshot_path record_shapes nvtx_ranges "
            "run_workload_inspector_server"
        ),
    ),
    FlagGroup(
        title="Faults and restarts of jobs",
        verdict=Verdict.MEGATRON,
        reason="as always in Megatron",
        destinations=names(
            "adlr_autoresume adlr_autoresume_interval enable_ft_package calc_ft_timeouts "
            "ft_num_warmup_iters rerun_mode fault_injector_ranks fault_injector_num_ranks "
            "fault_injector_fault_types fault_injector_fault_probabilities "
            "fault_injector_fault_delay fault_injector_delay_start_iteration "
            "fault_injector_mtti_seconds fault_injector_offset_seconds fault_injector_seed"
        ),
    ),
    FlagGroup(
        title="What holds anyway",
        verdict=Verdict.MEGATRON,
        reason="Megatron's core models, its experimental parts, rotary positions, an exact "
        "vocabulary, no storage client",
        destinations=names(
            "deprecated_use_mcore_models enable_experimental use_rotary_position_embeddings "
            "pad_vocab_size disable_msc_deprecated"
        ),
    ),
)
