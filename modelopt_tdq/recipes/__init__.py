"""The presets as files: arguments of ``modelopt_tdq.make_config``."""
