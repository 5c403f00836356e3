"""Fast tokenizer with the same ids as a SentencePiece BPE file, such as those of Mistral and Llama 2."""

from pathlib import Path

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast


def fast_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer; merges are ordered by SentencePiece's scores (by id, runs of blanks would split differently)."""
    pieces = SentencePieceProcessor(model_file=str(path))
    vocabulary = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    merges: list[tuple[float, int, int, str, str]] = []
    for piece, index in vocabulary.items():
        if pieces.is_control(index) or pieces.is_unknown(index) or pieces.is_byte(index):
            continue
        splits = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        pairs = [(left, right) for left, right in splits if left in vocabulary and right in vocabulary]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(pieces.get_score(index), len(left), len(right), left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    backend = Tokenizer(
        BPE(vocabulary, [merge[3:] for merge in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    control = [name for name, index in vocabulary.items() if pieces.is_control(index) or pieces.is_unknown(index)]
    backend.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
