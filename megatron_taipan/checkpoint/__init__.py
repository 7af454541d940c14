"""Checkpoints: complete-or-absent folders, written in one layout of ranks and read in any other. Where to look:

    read it, whole tensors      weights.open_weights: an exported folder or a checkpoint, merged; also open_checkpoint
    read it, pieces of tensors  reader.StateReader: the elements of one rank's shards, moments included
    begin a run with it         loading.load_training_state into an engine, loading.load_weights into a new model
    choose one                  verification.find_checkpoint, rewind_target; damage, refuse_damaged: is it undamaged
    save one                    snapshot.take_snapshot copies a rank's part to the host, saving.Saving writes it
    what is in the folder       folder: names, manifest, find_newest, locate, what is deleted when
    how far, and which run      metadata: Progress, identity, changed_settings
    one run a folder            lock.FolderLock
    how its training went       run_log: log.jsonl, which stands beside the checkpoints

Below these: `files` (durable files, safetensors), `randomness` (states of generators), `calibration` (thresholds of the
gates, found after training).
"""
