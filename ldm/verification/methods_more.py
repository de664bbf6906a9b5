"""Methods that the course notes do not number, by the names under which people look for them."""

from ldm.verification.method import Method

MORE = (
    Method(
        "zero-terminal SNR",
        "process sd_zero_snr; any table",
        "sqrt(alpha bar) shifted and scaled so that the last one is 0",
        "Lin et al. 2023 (2305.08891), algorithm 1",
        "diffusion/process.py: zero_terminal_snr",
        ("test_process.py::test_zero_terminal_snr_equals_the_published_algorithm",),
    ),
    Method(
        "offset noise",
        "diffusion.offset_noise",
        "one more draw for a whole channel, in training and at the start of sampling",
        "Guttenberg 2023",
        "diffusion/coupling.py: with_offset",
        ("test_coupling.py::test_offset_noise_has_the_covariance_that_it_says",),
    ),
    Method(
        "stratified and quasi-random times",
        "diffusion.timesteps.placement",
        "the times of a global batch are spread evenly, whatever ranks share it",
        "Kingma et al. 2021 (2107.00630), appendix I.1",
        "diffusion/schedule.py: stratify, quasi",
        ("test_timesteps.py::test_every_run_of_quasi_random_places_is_spread_evenly",),
    ),
    Method(
        "logit-normal, mode and log-normal times",
        "diffusion.timesteps.distribution",
        "laws of training times",
        "Esser et al. 2024 (2403.03206), eq. 19 and 20; Karras et al. 2022 (2206.00364)",
        "diffusion/schedule.py: DISTRIBUTIONS",
        (
            "test_timesteps.py::test_the_mode_law_is_that_of_stable_diffusion_3",
            "test_timesteps.py::test_the_edm_law_is_log_normal_in_sigma_over_alpha",
        ),
    ),
    Method(
        "importance sampling of times",
        "diffusion.timesteps.importance",
        "times drawn by the root of the second moment of the loss, without bias",
        "Nichol & Dhariwal 2021 (2102.09672), section 3.3",
        "diffusion/importance.py",
        ("test_timesteps.py::test_the_expectation_is_exactly_the_one_of_uniform_times",),
    ),
    Method(
        "transport with a condition cost",
        "diffusion.coupling_condition_weight",
        "noise is exchanged among like captions only, so that each still sees all noise",
        "Cheng & Schwing 2025 (2503.10636)",
        "diffusion/coupling.py: optimal_coupling",
        ("test_coupling.py::test_plain_transport_skews_the_noise_that_a_condition_sees",),
    ),
    Method(
        "guidance interval, rescale, dynamic threshold",
        "--interval, --rescale, --threshold",
        "when a rule acts, and what is done to its x0",
        "Kynkaanniemi et al. 2024 (2404.07724); Lin et al. 2023 (2305.08891); "
        "Saharia et al. 2022 (2205.11487)",
        "diffusion/guidance: Finish",
        (
            "test_guidance.py::test_guidance_acts_within_its_interval_only",
            "test_guidance.py::test_threshold_brings_the_percentile_of_every_picture_to_the_limit",
        ),
    ),
    Method(
        "perpendicular negative prompts",
        "--guidance perp_neg",
        "only the part of the negative direction that is perpendicular to the prompt's",
        "Armandpour et al. 2023 (2304.04968)",
        "diffusion/guidance: perpendicular_negative",
        ("test_guidance_rules.py::test_perp_neg_ignores_a_negative_along_the_prompt",),
    ),
    Method(
        "adaptive projected guidance (APG)",
        "--guidance apg",
        "less of the part of the difference that is parallel to x0",
        "Sadat et al. 2024 (2410.02416)",
        "diffusion/guidance: adaptive_projected",
        ("test_guidance_rules.py::test_apg_is_the_papers_algorithm_step_by_step",),
    ),
    Method(
        "autoguidance",
        "--guidance autoguidance --guide RUN",
        "away from a weaker model",
        "Karras et al. 2024 (2406.02507)",
        "diffusion/guidance: autoguidance",
        ("test_guidance_models.py::test_autoguidance_leads_away_from_the_weaker_model",),
    ),
    Method(
        "DDIM inversion",
        "ldm.inference.inversion: invert",
        "the noise from which a deterministic sampler draws a picture, of order 1 or 2",
        "Song et al. 2020 (2010.02502), section 4.3",
        "diffusion/inversion.py: invert",
        ("test_inversion.py::test_the_error_of_the_noise_falls_with_the_order_of_the_method",),
    ),
    Method(
        "latent interpolation",
        "ldm.inference.inversion: interpolate",
        "the arc between two noises keeps their law",
        "Song et al. 2020 (2010.02502), eq. 67",
        "diffusion/inversion.py: slerp",
        ("test_inversion.py::test_slerp_keeps_the_law_of_the_norm",),
    ),
    Method(
        "continuous ELBO, bits per dimension",
        "ldm evaluate likelihood",
        "half the integral of the error of x0 over SNR; the limit of the discrete bound",
        "Kingma et al. 2021 (2107.00630), eq. 11 and 17",
        "diffusion/elbo.py: continuous_elbo",
        ("test_likelihood.py::test_many_small_steps_tend_to_the_continuous_bound_with_order_one",),
    ),
    Method(
        "rotary positions, extrapolation",
        "model.positions, base_size, rope_scaling",
        "a logit depends on the offset alone; larger pictures interpolate or slow the rotations",
        "Su et al. 2021 (2104.09864); Chen et al. 2023 (2306.15595); Peng et al. 2023 (2309.00071)",
        "models/positions.py",
        (
            "test_positions.py::test_a_rotary_logit_depends_on_the_offset_alone",
            "test_positions.py::test_ntk_scaling_slows_the_slowest_pair_alone_by_the_whole_factor",
        ),
    ),
    Method(
        "masked and routed tokens",
        "model.masking",
        "a random part of the patches is trained on, or skips some blocks",
        "Zheng et al. 2023 (2306.09305); Sehwag et al. 2024 (2407.15811); "
        "Krause et al. 2025 (2501.04765)",
        "models/routing.py; training/masking.py",
        (
            "test_dit_routing.py::test_masked_patches_are_not_seen_and_nothing_is_predicted_there",
            "test_dit_routing.py::test_routed_tokens_skip_their_blocks_and_come_back",
            "test_dit_training.py::test_the_loss_is_the_mean_over_the_kept_pixels",
        ),
    ),
)
"""Here `number` is the name that is looked for, and `name` where it is set."""
