"""Flags of Megatron for other data, other schedules and other kinds of runs than those here."""

from megatron_dip.families.flags.groups import LEAVE_OUT, FlagGroup, refused

__all__ = ["REFUSED_RUNS"]


REFUSED_RUNS: tuple[FlagGroup, ...] = (
    refused(
        "Data",
        "the data are those of the file: data.path, data.valid_share and data.cache_folder; "
        f"{LEAVE_OUT}",
        "data_path split train_data_path valid_data_path test_data_path data_args_path "
        "per_split_data_args_path per_dataset_sequences_path dataloader_fast_cache_load "
        "dataloader_defer_npy_index_mmap data_cache_path mmap_bin_files mock_data "
        "num_dataset_builder_threads object_storage_cache_path mid_level_dataset_surplus "
        "encoder_seq_length decoder_seq_length sample_rate mask_prob short_seq_prob enable_msc",
    ),
    refused(
        "Several sets for validation",
        f"a configuration names one data set, with one part for validation; {LEAVE_OUT}",
        "multiple_validation_sets validation_set_names",
    ),
    refused(
        "Growing batches, the old way",
        "this Megatron takes no notice of it; use --step-batch-size-schedule",
        "rampup_batch_size",
    ),
    refused(
        "Freezing",
        f"nothing would be trained, and the file says what is: trainable of a module; {LEAVE_OUT}",
        "freeze_all_layers",
    ),
    refused(
        "Documents",
        "every sample has positions and attention of its own, and losses as its family says; "
        f"{LEAVE_OUT}",
        "reset_position_ids reset_attention_mask dataloader_inter_document_masking eod_mask_loss "
        "create_attention_mask_in_dataloader allow_ambiguous_pad_tokens sft "
        "sft_tokenizer_prompt_format fim_data fim_rate fim_spm_rate fim_split_sample "
        "fim_fragment_rate fim_no_prefix fim_prefix_token fim_middle_token fim_suffix_token "
        "fim_pad_token fim_eod_token",
    ),
    refused(
        "Tokenizer",
        f"the tokenizer is data.tokenizer of the file; {LEAVE_OUT}",
        "tokenizer_model vocab_file merge_file vocab_extra_ids metadata_path special_tokens "
        "tiktoken_pattern tiktoken_num_special_tokens tokenizer_sentencepiece_legacy "
        "tokenizer_sentencepiece_ignore_extra_whitespaces tokenizer_hf_no_use_fast "
        "tokenizer_hf_no_include_special_tokens trust_remote_code null_tokenizer_eod_id "
        "null_tokenizer_pad_id chat_template",
    ),
    refused(
        "Size of the vocabulary",
        f"vocab_size of the file is exact and not padded; {LEAVE_OUT}",
        "padded_vocab_size make_vocab_size_divisible_by",
        make_vocab_size_divisible_by=(1,),
    ),
    refused(
        "Images of Megatron's own vision models",
        "the file states them: model.vision.patch_size, data.min_image_tokens and "
        f"data.max_image_tokens; {LEAVE_OUT}",
        "num_classes img_h img_w num_channels patch_dim classes_fraction data_per_class_fraction "
        "data_sharding head_lr_mult vision_pretraining vision_pretraining_type "
        "vision_backbone_type swin_backbone_type mask_type mask_factor iter_per_epoch "
        "dino_local_img_size dino_local_crops_number dino_head_hidden_size dino_bottleneck_size "
        "dino_freeze_last_layer dino_norm_last_layer dino_warmup_teacher_temp dino_teacher_temp "
        "dino_warmup_teacher_temp_epochs",
    ),
    refused(
        "Optimizers that look at the shape of attention",
        "Megatron takes it from one configuration, and the modules have several; "
        "use --optimizer adam, sgd or lion",
        "muon_momentum muon_split_qkv muon_nesterov muon_scale_mode muon_fp32_matmul_prec "
        "muon_coefficient_type muon_num_ns_steps muon_tp_mode muon_extra_scale_factor "
        "muon_scalar_optimizer use_layer_wise_param_layout",
    ),
    refused(
        "Interleaved schedule",
        "Megatron's own schedule here is 1F1B, and --dip-schedule has the partition of the file; "
        f"{LEAVE_OUT}",
        "num_layers_per_virtual_pipeline_stage num_virtual_stages_per_pipeline_rank "
        "pipeline_model_parallel_layout microbatch_group_size_per_vp_stage "
        "overlap_p2p_comm_warmup_flush align_grad_reduce overlap_param_gather_with_optimizer_step "
        "overlap_moe_expert_parallel_comm overlap_dispatch_backward_with_experts_wgrad "
        "ep_overlap_early_attn_memory_release delay_wgrad_compute defer_embedding_wgrad_compute "
        "wgrad_deferral_limit use_ring_exchange_p2p",
    ),
    refused(
        "Context parallelism of several kinds",
        f"every sample is divided alike; use --context-parallel-size alone; {LEAVE_OUT}",
        "hierarchical_context_parallel_sizes max_seqlen_per_dp_cp_rank hybrid_context_parallel",
    ),
    refused(
        "Overlap inside tensor parallelism",
        f"its buffers have one size, and packed rows have many; {LEAVE_OUT}",
        "tp_comm_overlap tp_comm_overlap_cfg tp_comm_bulk_wgrad tp_comm_bulk_dgrad "
        "tp_comm_overlap_ag tp_comm_overlap_rs tp_comm_overlap_rs_dgrad tp_comm_split_ag "
        "tp_comm_split_rs tp_comm_bootstrap_backend symmetric_ar_type",
    ),
    refused(
        "Sharded and offloaded weights and activations",
        f"not there yet; use --use-distributed-optimizer; {LEAVE_OUT}",
        "tensor_parallel_num_weight_shards expert_tensor_parallel_num_weight_shards "
        "use_megatron_fsdp use_torch_fsdp2 fsdp_manual_registration "
        "data_parallel_sharding_strategy outer_dp_sharding_strategy fsdp_double_buffer "
        "suggested_communication_unit_size "
        "keep_fp8_transpose_cache enable_full_sharding_in_hsdp torch_fsdp2_reshard_after_forward "
        "megatron_fsdp_main_params_dtype megatron_fsdp_main_grads_dtype "
        "megatron_fsdp_grad_comm_dtype megatron_fsdp_enable_fine_grained_param_gather "
        "megatron_fsdp_max_pool_double_buffer fsdp_db_use_persist_buf_on_alloc_fail "
        "strict_fsdp_dtensor_load cpu_offloading_num_layers "
        "cpu_offloading_retain_pinned_cpu_buffers fine_grained_activation_offloading "
        "offload_modules min_offloaded_tensor_size delay_offload_until_cuda_graph "
        "delta_offload_bytes_across_pp_ranks activation_offload_fraction "
        "fine_grained_offloading_max_inflight_offloads",
        cpu_offloading_num_layers=(0,),
    ),
    refused(
        "CUDA graphs",
        f"a graph fixes shapes and an order that change with every batch; {LEAVE_OUT}",
        "enable_cuda_graph external_cuda_graph cuda_graph_impl cuda_graph_warmup_steps "
        "cuda_graph_modules cuda_graph_scope_deprecated",
        cuda_graph_impl=("none",),
    ),
    refused(
        "Restart inside the process",
        "the planner's processes and groups would outlive it; restart the job "
        "(torchrun --max-restarts, or the SLURM script)",
        "inprocess_restart inprocess_max_iterations inprocess_monitor_thread_interval "
        "inprocess_monitor_process_interval inprocess_progress_watchdog_interval "
        "inprocess_heartbeat_interval inprocess_soft_timeout inprocess_hard_timeout "
        "inprocess_heartbeat_timeout inprocess_barrier_timeout inprocess_completion_timeout "
        "inprocess_last_call_wait inprocess_termination_grace_time inprocess_granularity "
        "inprocess_active_world_size inprocess_empty_cuda_cache",
    ),
    refused(
        "Measurements inside the forward of a script",
        f"nothing here measures it; --dip-trace-dir records the times of stages; {LEAVE_OUT}",
        "save_activations_interval save_wgrads_interval save_dgrads_interval",
    ),
    refused(
        "Logits of another model",
        f"nothing here saves or learns from logits; {LEAVE_OUT}",
        "logits_save_top_k logits_save_top_p logits_save_top_p_min_k logits_save_dir "
        "logits_save_dtype logits_load_dir logits_load_decode_threads logits_load_prefetch_factor "
        "logits_load_msc_prefetch_depth logits_load_kd_loss_alpha logits_load_ignore_errors",
    ),
    refused(
        "Reinforcement learning",
        f"the examples train on data that is there; {LEAVE_OUT}",
        "perform_rl_step rl_prompts_per_eval grpo_prompts_per_step grpo_group_size "
        "rl_generation_lag rl_submission_granularity rl_consumption_granularity grpo_iterations "
        "grpo_clamp_eps_lower grpo_clamp_eps_upper grpo_kl_beta grpo_entropy_term_weight "
        "grpo_filter_groups_with_same_reward langrl_env_config rl_default_temperature "
        "rl_default_top_p rl_default_top_k rl_offload_optimizer_during_inference "
        "rl_kv_cache_management_mode rl_persist_cuda_graphs rl_partial_rollouts "
        "rl_inference_logprobs_is_correction rl_importance_sampling_truncation_coef "
        "rl_use_sequence_packing rl_sequence_packing_max_sequences_per_bin "
        "rl_sequence_packing_algo rl_training_cuda_graphs "
        "rl_inference_tensor_model_parallel_size rl_inference_pipeline_model_parallel_size "
        "rl_inference_expert_model_parallel_size rl_inference_expert_tensor_model_parallel_size "
        "rl_inference_model_unified_memory_level rl_offload_inference_model_weights_when_idle "
        "refit_method rl_verify_model_weights_swap rl_skip_bos_token rl_profile rl_profile_dir "
        "rl_inference_parsers",
    ),
    refused(
        "Retrieval",
        f"there is no such model here; {LEAVE_OUT}",
        "ict_head_size biencoder_projection_dim biencoder_shared_query_context_model ict_load "
        "bert_load titles_data_path query_in_block_prob use_one_sent_docs evidence_data_path "
        "retriever_report_topk_accuracies retriever_score_scaling block_data_path embedding_path "
        "indexer_batch_size indexer_log_interval",
    ),
    refused(
        "Inference",
        f"a training run does not generate; {LEAVE_OUT}",
        "inference_batch_times_seqlen_threshold max_tokens_to_oom output_bert_embeddings "
        "bert_embedder_type use_legacy_static_engine inference_max_requests "
        "inference_max_seq_length inference_dynamic_batching "
        "inference_dynamic_batching_buffer_size_gb "
        "inference_dynamic_batching_paused_buffer_size_gb "
        "inference_dynamic_batching_mamba_memory_ratio inference_dynamic_batching_block_size "
        "inference_dynamic_batching_max_requests inference_dynamic_batching_max_tokens "
        "inference_dynamic_batching_num_cuda_graphs "
        "inference_dynamic_batching_track_paused_request_events "
        "inference_dynamic_batching_track_generated_token_events decode_only_cuda_graphs "
        "inference_cuda_graph_all_prefills inference_cuda_graph_max_tokens "
        "inference_dynamic_batching_unified_memory_level enable_chunked_prefill "
        "num_speculative_tokens inference_dynamic_batching_enable_prefix_caching "
        "inference_dynamic_batching_prefix_caching_eviction_policy "
        "inference_dynamic_batching_prefix_caching_coordinator_policy "
        "inference_dynamic_batching_prefix_caching_routing_alpha "
        "inference_dynamic_batching_prefix_caching_mamba_gb "
        "inference_dynamic_batching_cuda_graph_mixed_prefill_count "
        "inference_dynamic_batching_cuda_graph_sizing_distribution "
        "inference_dynamic_batching_sampling_backend offset_sampling_seed_by_dp_rank "
        "inference_dynamic_batching_async_sched_mode inference_dynamic_batching_logprobs_mode "
        "inference_logging_step_interval inference_text_gen_server_logging "
        "inference_wandb_logging inference_coordinator_port mamba_inference_conv_states_dtype "
        "mamba_inference_ssm_states_dtype inference_use_synchronous_zmq_collectives "
        "inference_disable_ep_consensus inference_shards inference_cuda_graph_scope "
        "inference_rng_tracker flash_decode nccl_all_reduce_for_prefill "
        "inference_fuse_tp_communication inference_disable_triton_nvls_kernels "
        "inference_grouped_gemm_backend inference_moe_disable_fused_quant_kernels "
        "inference_moe_token_dispatcher_type moe_pad_experts_for_cuda_graph_inference",
    ),
    refused(
        "What Megatron itself no longer reads",
        f"this Megatron has no use for it (see its --help for what took its place); {LEAVE_OUT}",
        "batch_size warmup model_parallel_size checkpoint_activations use_dist_ckpt_deprecated "
        "dist_ckpt_format_deprecated ckpt_fully_parallel_save_deprecated test_mode",
    ),
    refused(
        "Processes that are not there",
        f"all ranks of a run exist and start together; {LEAVE_OUT}",
        "lazy_mpu_init fake_process_group",
    ),
)
