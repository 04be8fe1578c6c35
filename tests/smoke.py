"""``pytest -m smoke``: a first look at every module, about a minute on two cores.

Each named test runs with all of its cases: values and gradients of each op on each backend, a run
that resumes, a folder clustered, steps of OpenCLIP's trainer, a page, a comparison.
"""

SMOKE = {
    "test_checkpoint.py": ["test_a_torn_checkpoint_is_told_from_a_whole_one"],
    "test_clip_loss.py": ["test_clip_loss_is_open_clips", "test_siglip_loss_is_open_clips"],
    "test_cluster.py": ["test_the_table_says_group_distance_and_rank_of_every_row"],
    "test_command_line.py": ["test_mistakes_are_answered_before_torch_is_imported"],
    "test_compare.py": ["test_rows_are_compared_on_every_seed"],
    "test_config.py": ["*"],
    "test_data_builtin.py": ["test_a_pair_of_shapes_does_not_depend_on_how_many_there_are"],
    "test_data_files.py": ["test_a_table_has_unicode_and_paths_beside_it"],
    "test_data_folders.py": ["test_class_folders_are_pairs"],
    "test_data_parquet.py": ["test_files_of_the_datasets_library_round_trip"],
    "test_data_shards.py": ["test_shards_round_trip_and_the_cached_index_follows_the_file"],
    "test_distributed_losses.py": ["test_rows_of_rank_0_reach_every_rank"],
    "test_estimator.py": ["test_it_is_kmeans"],
    "test_evaluate.py": ["test_scores_are_those_of_the_metrics"],
    "test_examples.py": ["*"],
    "test_feature_store.py": ["test_the_newest_row_of_a_sample_counts"],
    "test_grad_cache.py": ["test_gradients_are_those_of_the_chunks_in_one_graph"],
    "test_house.py": ["*"],
    "test_kmeans.py": ["test_well_separated_blobs_are_found"],
    "test_labels.py": ["test_a_sample_that_left_the_capacity_has_no_label"],
    "test_metrics.py": ["test_retrieval_by_hand"],
    "test_openclip_export.py": ["test_the_exported_folder_gives_the_same_bits"],
    "test_openclip_proto_loss.py": ["test_it_is_clip_loss_until_the_stated_step"],
    "test_openclip_trainer.py": ["test_plain_losses_are_open_clips_step_by_step"],
    "test_ops.py": ["test_values_and_gradients_are_within_budget"],
    "test_own_loss.py": ["test_keywords_are_flags"],
    "test_plan.py": ["test_the_command_takes_trains_flags"],
    "test_prototypes.py": ["test_the_loss_is_the_weighted_sum_of_its_terms"],
    "test_readme.py": ["test_links_lead_somewhere", "test_flags_exist", "test_no_dialect"],
    "test_report_page.py": ["test_the_command_writes_the_page_and_says_the_answer"],
    "test_resume.py": ["test_auto_starts_a_named_run_and_goes_on_with_it"],
    "test_sentence_transformers.py": ["test_a_text_is_its_tokens_wherever_the_padding_is"],
    "test_teacher.py": ["test_rows_are_found_by_key_whatever_their_order"],
}


def is_smoke(file: str, test: str) -> bool:
    """Whether a test, without its parameters, belongs to the first look."""
    return not {"*", test}.isdisjoint(SMOKE.get(file, ()))
