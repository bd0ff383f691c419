"""Every metric: name, type, labels, buckets, help. Code, documents, dashboards and tests all read this list."""

from __future__ import annotations

from promprune_vllm.metrics.metric import Metric

_BY_METHOD = ("model_name", "method")
_BY_MODALITY = (*_BY_METHOD, "modality")
_TOKENS = tuple(float(n) for n in (16, 32, 64, 96, 128, 192, 256, 384, 576, 768, 1024, 2048, 4096, 8192, 16384))
_SHARES = tuple(i / 20 for i in range(1, 21))
_ONCE = "Counted once per prompt, when the engine accepts it, whether its images and videos are cached or not."

REQUESTS = Metric(
    "promprune_requests_total",
    "counter",
    "Prompts by outcome: pruned (at least one image or video lost tokens), full (all kept every token), "
    "text (neither images nor videos), refused (a visual token budget that cannot be honored). A prompt is "
    "counted again as failed if selecting the tokens of its images or videos failed.",
    labels=("model_name", "outcome"),
)
REFUSED = Metric(
    "promprune_refused_requests_total",
    "counter",
    "Requests refused with HTTP 400 by reason: invalid (not a budget), limits (outside the server's limits), "
    "images (does not match the images and videos), method (not allowed), unsupported (model, image or video "
    "cannot be pruned), field (misspelled, or in the wrong place).",
    labels=("model_name", "reason"),
)
BUDGETS = Metric(
    "promprune_budgets_total",
    "counter",
    "Prompts with images or videos whose request sent a visual token budget, by the kind of budget.",
    labels=("model_name", "form"),
)
IMAGES = Metric(
    "promprune_images_total",
    "counter",
    "Images and videos by the method that prunes them, and by whether vLLM's processor cache already held them "
    f"with the same settings. {_ONCE}",
    labels=(*_BY_MODALITY, "cached"),
    unpruned=True,
)
TOKENS_SEEN = Metric(
    "promprune_visual_tokens_seen_total",
    "counter",
    f"Visual tokens of images and videos before pruning. {_ONCE}",
    labels=_BY_MODALITY,
    unpruned=True,
)
TOKENS_KEPT = Metric(
    "promprune_visual_tokens_kept_total",
    "counter",
    f"Visual tokens of images and videos that enter the language model. {_ONCE}",
    labels=_BY_MODALITY,
    unpruned=True,
)
TOKENS_SAVED = Metric(
    "promprune_visual_tokens_saved_total",
    "counter",
    f"Visual tokens of images and videos that never enter the language model: seen minus kept. {_ONCE}",
    labels=_BY_MODALITY,
)
KV_BYTES_SAVED = Metric(
    "promprune_kv_cache_saved_bytes_total",
    "counter",
    "Bytes of KV cache that prompts do not use because of pruning, over all layers and ranks: whole blocks of "
    f"the unpruned prompt minus whole blocks of the pruned one, as if no block were shared. {_ONCE}",
    labels=_BY_METHOD,
    derived=True,
)
FLOPS_AVOIDED = Metric(
    "promprune_prefill_flops_avoided_total",
    "counter",
    "Floating-point operations of the language model's prefill that pruning avoids: F(unpruned tokens) minus "
    "F(pruned tokens), F(n) = 2 n (weights of all decoder layers) + 2 n (n + 1) layers x heads x head size, as if "
    f"no prefix were cached. {_ONCE}",
    labels=_BY_METHOD,
    derived=True,
)
IMAGE_KEPT_TOKENS = Metric(
    "promprune_image_kept_tokens",
    "histogram",
    f"Visual tokens kept per image or video. {_ONCE}",
    labels=_BY_MODALITY,
    buckets=_TOKENS,
    unpruned=True,
)
FIRST_TOKEN_SECONDS = Metric(
    "promprune_first_token_seconds",
    "histogram",
    "Time from a processed prompt with images or videos to the first token of its answer, by whether the prompt "
    "was pruned. A first answer that was thrown away is part of it.",
    labels=("model_name", "pruned"),
    # As vllm:time_to_first_token_seconds has them, without the shortest and the longest.
    buckets=(0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
SELECTION_SECONDS = Metric(
    "promprune_selection_seconds",
    "histogram",
    "Time to choose the tokens of one image or video (stage choose), and to gather or merge their rows (stage "
    "assemble); once per encoding. What is in the encoder cache is not selected again.",
    labels=(*_BY_METHOD, "stage"),
    # From a fused kernel (50 us) to a 16k-token image on a CPU (1 s).
    buckets=(5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1, 0.2, 0.5, 1.0),
)
SPECTRAL_ENTROPY = Metric(
    "promprune_spectral_entropy",
    "histogram",
    "Spectral entropy of an image's tokens, 0 (all alike) to 1 (all different), for methods that use it. Observed "
    "once per selection: per encoded image, per tile of it, or per frame of a video.",
    labels=_BY_METHOD,
    buckets=_SHARES,
)
SALIENCY_SHARE = Metric(
    "promprune_saliency_share",
    "histogram",
    "Share of the kept tokens chosen for saliency rather than coverage, for methods that split the budget this "
    "way. Observed once per selection: per encoded image, per tile of it, or per frame of a video.",
    labels=_BY_METHOD,
    buckets=_SHARES,
)
ENCODER_BATCH_TOKENS = Metric(
    "promprune_encoder_batch_tokens",
    "histogram",
    "Unpruned visual tokens per call of the vision encoder: a step's images, or videos, are encoded in "
    "micro-batches of at most the size that the encoder's memory was profiled for.",
    buckets=(256.0, 576.0, 1024.0, 2048.0, 4096.0, 8192.0, 16384.0, 32768.0, 65536.0),
)
ESCALATIONS = Metric(
    "promprune_escalations_total",
    "counter",
    "Prompts whose answer could be asked for again, by decision: sure (the first answer left), asked_again (the "
    "second answer left), no_room (the longer prompt would not fit, so the first answer left), failed (the prompt "
    "could not be processed again, so the first was sent again).",
    labels=("model_name", "decision"),
)
CONFIDENCE = Metric(
    "promprune_answer_confidence",
    "histogram",
    "Confidence of first answers that could be asked for again: lowest probability of the likeliest token among "
    "the first tokens (--visual-token-escalate-window), or among those before the answer was thrown away.",
    # Close to 1, where thresholds are.
    buckets=(0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0),
)
DISCARDED_TOKENS = Metric(
    "promprune_escalation_discarded_tokens_total",
    "counter",
    "Tokens of first tries that were thrown away: of the prompt, of its images and videos (visual), and of the "
    "answer. They are not among the tokens that other metrics count.",
    labels=("model_name", "tokens"),
)
_BY_SIZE = ("model_name", "size")
_AUDITED = (*_BY_METHOD, "kept", "agrees")
_ACCEPTED = (
    "A greedy token agrees if all visual tokens rank it first too; any other token agrees with probability "
    "min(1, p / q): p is its probability with all visual tokens, q with the kept ones"
)
AUDIT_REQUESTS = Metric(
    "promprune_audits_total",
    "counter",
    "Pruned requests drawn for an audit (--visual-token-audit), by what became of it: audited; busy (requests "
    "began to wait); no_space (too many audits waited, or the images are too large to be held); too_long (the "
    "prompt with all visual tokens and the answer); refused (vLLM does not take that prompt, for example because "
    "an image was only named); unsupported (several answers, or another engine prefills); unanswered (the client "
    "left, or the answer failed); failed.",
    labels=("model_name", "audit"),
)
AUDITED_TOKENS = Metric(
    "promprune_audited_tokens_total",
    "counter",
    f"Tokens of audited answers, by whether all visual tokens would have said the same. {_ACCEPTED}.",
    labels=_AUDITED,
)
AUDITED_ANSWERS = Metric(
    "promprune_audited_answers_total",
    "counter",
    "Audited answers, by whether all visual tokens would have given the same answer: whether every token agrees. "
    "Of sampled answers, the probability that they do.",
    labels=_AUDITED,
)
AUDIT_NATS = Metric(
    "promprune_audit_nats",
    "histogram",
    "By how many nats per token all visual tokens make an audited answer less probable than the kept ones do; 0 "
    "if they make it more probable.",
    labels=_BY_METHOD,
    buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
)
AUDIT_TOKENS = Metric(
    "promprune_audit_tokens_total",
    "counter",
    "Tokens that finished audits processed: all of the prompt, and the answer.",
)
FEATURE_STORE_IMAGES = Metric(
    "promprune_feature_store_images_total",
    "counter",
    "Images and videos that the worker needed and found in the feature cache (hit: not encoded again) or not "
    "(miss). Zero without --visual-token-feature-cache-gb.",
    labels=("model_name", "result"),
)
FEATURE_STORE_BYTES = Metric(
    "promprune_feature_store_bytes",
    "gauge",
    "Host memory of the images and videos in the feature cache, summed over engines, of the first rank of each. "
    "Zero without --visual-token-feature-cache-gb.",
    combine="sum",
)
POLICY_LEVEL = Metric(
    "promprune_policy_level",
    "gauge",
    "Share of the default budget that images and videos currently keep if their request sets no budget; below 1 "
    "under load. With several API servers, the lowest.",
)
TARGET_SHARE = Metric(
    "promprune_target_share",
    "gauge",
    "Share of its visual tokens that an image keeps under --visual-token-target if its request sets no budget; 1 "
    "without a target.",
    labels=_BY_SIZE,
)
TARGET_PROOF = Metric(
    "promprune_target_proof",
    "gauge",
    "How far audits have proven that the next smaller share keeps the target too: at 1, it is taken. 0 without a "
    "target, or at the smallest share.",
    labels=_BY_SIZE,
)
TARGET_TRIALS = Metric(
    "promprune_target_trials_total",
    "counter",
    "Audited answers that were also scored with the next smaller share, by whether all visual tokens and that "
    "share would both have given them. Of sampled answers, the probability that they would.",
    labels=(*_BY_SIZE, "agrees"),
)
BUILD_INFO = Metric(
    "promprune_build_info",
    "gauge",
    "Always 1; the labels show the method and the versions that run.",
    labels=("model_name", "method", "version", "vllm_version", "vllm_tested"),
)
PART_OFF = Metric(
    "promprune_part_off",
    "gauge",
    "1 for each part that is off, because this version of vLLM was not tested and has changed code that the part "
    "depends on (`GET /v1/visual_tokens` says which code); 0 for the others.",
    labels=("model_name", "part"),
)

CATALOG = (
    REQUESTS,
    REFUSED,
    BUDGETS,
    IMAGES,
    TOKENS_SEEN,
    TOKENS_KEPT,
    TOKENS_SAVED,
    KV_BYTES_SAVED,
    FLOPS_AVOIDED,
    IMAGE_KEPT_TOKENS,
    FIRST_TOKEN_SECONDS,
    SELECTION_SECONDS,
    SPECTRAL_ENTROPY,
    SALIENCY_SHARE,
    ENCODER_BATCH_TOKENS,
    ESCALATIONS,
    CONFIDENCE,
    DISCARDED_TOKENS,
    AUDIT_REQUESTS,
    AUDITED_TOKENS,
    AUDITED_ANSWERS,
    AUDIT_NATS,
    AUDIT_TOKENS,
    FEATURE_STORE_IMAGES,
    FEATURE_STORE_BYTES,
    POLICY_LEVEL,
    TARGET_SHARE,
    TARGET_PROOF,
    TARGET_TRIALS,
    BUILD_INFO,
    PART_OFF,
)
