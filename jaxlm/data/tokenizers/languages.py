"""The language codes of multilingual translation models, and where their encoders and decoders read them.

NLLB: Costa-jussà et al., arXiv:2207.04672 (FLORES-200 codes); M2M-100: Fan et al., arXiv:2010.11125; mBART: Liu et al.,
arXiv:2001.08210; mBART-50: Tang et al., arXiv:2008.00401. The codes are in the order of their rows of embeddings.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from jaxlm.core.errors import UserError

_NLLB = """
ace_Arab ace_Latn acm_Arab acq_Arab aeb_Arab afr_Latn ajp_Arab aka_Latn amh_Ethi apc_Arab arb_Arab ars_Arab ary_Arab
arz_Arab asm_Beng ast_Latn awa_Deva ayr_Latn azb_Arab azj_Latn bak_Cyrl bam_Latn ban_Latn bel_Cyrl bem_Latn ben_Beng
bho_Deva bjn_Arab bjn_Latn bod_Tibt bos_Latn bug_Latn bul_Cyrl cat_Latn ceb_Latn ces_Latn cjk_Latn ckb_Arab crh_Latn
cym_Latn dan_Latn deu_Latn dik_Latn dyu_Latn dzo_Tibt ell_Grek eng_Latn epo_Latn est_Latn eus_Latn ewe_Latn fao_Latn
pes_Arab fij_Latn fin_Latn fon_Latn fra_Latn fur_Latn fuv_Latn gla_Latn gle_Latn glg_Latn grn_Latn guj_Gujr hat_Latn
hau_Latn heb_Hebr hin_Deva hne_Deva hrv_Latn hun_Latn hye_Armn ibo_Latn ilo_Latn ind_Latn isl_Latn ita_Latn jav_Latn
jpn_Jpan kab_Latn kac_Latn kam_Latn kan_Knda kas_Arab kas_Deva kat_Geor knc_Arab knc_Latn kaz_Cyrl kbp_Latn kea_Latn
khm_Khmr kik_Latn kin_Latn kir_Cyrl kmb_Latn kon_Latn kor_Hang kmr_Latn lao_Laoo lvs_Latn lij_Latn lim_Latn lin_Latn
lit_Latn lmo_Latn ltg_Latn ltz_Latn lua_Latn lug_Latn luo_Latn lus_Latn mag_Deva mai_Deva mal_Mlym mar_Deva min_Latn
mkd_Cyrl plt_Latn mlt_Latn mni_Beng khk_Cyrl mos_Latn mri_Latn zsm_Latn mya_Mymr nld_Latn nno_Latn nob_Latn npi_Deva
nso_Latn nus_Latn nya_Latn oci_Latn gaz_Latn ory_Orya pag_Latn pan_Guru pap_Latn pol_Latn por_Latn prs_Arab pbt_Arab
quy_Latn ron_Latn run_Latn rus_Cyrl sag_Latn san_Deva sat_Beng scn_Latn shn_Mymr sin_Sinh slk_Latn slv_Latn smo_Latn
sna_Latn snd_Arab som_Latn sot_Latn spa_Latn als_Latn srd_Latn srp_Cyrl ssw_Latn sun_Latn swe_Latn swh_Latn szl_Latn
tam_Taml tat_Cyrl tel_Telu tgk_Cyrl tgl_Latn tha_Thai tir_Ethi taq_Latn taq_Tfng tpi_Latn tsn_Latn tso_Latn tuk_Latn
tum_Latn tur_Latn twi_Latn tzm_Tfng uig_Arab ukr_Cyrl umb_Latn urd_Arab uzn_Latn vec_Latn vie_Latn war_Latn wol_Latn
xho_Latn ydd_Hebr yor_Latn yue_Hant zho_Hans zho_Hant zul_Latn
"""
_M2M = """
af am ar ast az ba be bg bn br bs ca ceb cs cy da de el en es et fa ff fi fr fy ga gd gl gu ha he hi hr ht hu hy id ig
ilo is it ja jv ka kk km kn ko lb lg ln lo lt lv mg mk ml mn mr ms my ne nl no ns oc or pa pl ps pt ro ru sd si sk sl so
sq sr ss su sv sw ta th tl tn tr uk ur uz vi wo xh yi yo zh zu
"""
_MBART = """
ar_AR cs_CZ de_DE en_XX es_XX et_EE fi_FI fr_XX gu_IN hi_IN it_IT ja_XX kk_KZ ko_KR lt_LT lv_LV my_MM ne_NP nl_XX ro_RO
ru_RU si_LK tr_TR vi_VN zh_CN
"""
_MBART50 = _MBART + """
af_ZA az_AZ bn_IN fa_IR he_IL hr_HR id_ID ka_GE km_KH mk_MK ml_IN mn_MN mr_IN pl_PL ps_AF pt_XX sv_SE sw_KE ta_IN te_IN
th_TH tl_XX uk_UA ur_PK xh_ZA gl_ES sl_SI
"""
_WMT21 = "en ha is ja cs ru zh de"  # the M2M models of that evaluation, language_codes "wmt21"


@dataclass(frozen=True)
class LanguageConvention:
    """How one tokenizer class spells languages.

    Attributes:
        codes: in the order of their ids.
        default_source: the language of the source where nothing names it.
        pattern: a regular expression for the special tokens that are languages; its first group is the code.
        code_before_text: the code precedes the text, and the end token follows the text; otherwise the code follows the
            end token.
        decoder_starts_with_code: the decoder starts with the code; otherwise the code is the first token that it
            produces after its start token.
    """

    codes: tuple[str, ...]
    default_source: str
    pattern: str
    code_before_text: bool = True
    decoder_starts_with_code: bool = False


class LanguageCodes(Mapping[str, int]):
    """The languages of a tokenizer: the id of each code, in the order of ids. Empty for a tokenizer of one language.

    Attributes:
        default_source: the language of the source where the caller names none.
        default_target: the same of the target; None where tokenizer_config.json names none.
        code_before_text, decoder_starts_with_code: see ``LanguageConvention``.
    """

    def __init__(
        self, convention: LanguageConvention | None, special_tokens: Mapping[str, int], config: Mapping[str, Any]
    ):
        """``config`` is the content of tokenizer_config.json."""
        self.default_source = config.get("src_lang") or (convention.default_source if convention else None)
        self.default_target = config.get("tgt_lang")
        self.code_before_text = convention is None or convention.code_before_text
        self.decoder_starts_with_code = convention is not None and convention.decoder_starts_with_code
        found = []
        if convention:
            matches = ((re.fullmatch(convention.pattern, token), index) for token, index in special_tokens.items())
            found = sorted(((match[1], index) for match, index in matches if match), key=lambda item: item[1])
        self._ids = dict(found)

    def __getitem__(self, code: str) -> int:
        return self._ids[code]

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    def __len__(self) -> int:
        return len(self._ids)

    def id_of(self, language: str | None) -> int:
        """The id of a language's code.

        Raises:
            UserError: when the tokenizer does not have the language (the message names the nearest codes), or when
                ``language`` is None.
        """
        if language in self._ids:
            return self._ids[language]
        if not self._ids:
            raise UserError(f"the tokenizer has no languages, so {language!r} cannot be chosen; leave it out")
        if language is None:
            raise UserError(f"say which language to translate into: one of {', '.join(list(self._ids)[:8])}, …")
        near = difflib.get_close_matches(language, self._ids, n=3, cutoff=0.0)
        raise UserError(f"the model has no language {language!r}; did you mean {' or '.join(near)}?")


_FAMILIES = {
    "NllbTokenizer": LanguageConvention(tuple(_NLLB.split()), "eng_Latn", r"([a-z]{3}_[A-Z][a-z]{3})"),
    "M2M100Tokenizer": LanguageConvention(tuple(_M2M.split()), "en", r"__(\w+?)__"),
    "MBartTokenizer": LanguageConvention(tuple(_MBART.split()), "en_XX", r"([a-z]{2}_[A-Z]{2})", False, True),
    "MBart50Tokenizer": LanguageConvention(tuple(_MBART50.split()), "en_XX", r"([a-z]{2}_[A-Z]{2})"),
}


def language_convention(family: str, config: Mapping[str, Any]) -> LanguageConvention | None:
    """The convention of a tokenizer class (named without "Fast") with its tokenizer_config.json; None for a class
    without languages."""
    convention = _FAMILIES.get(family)
    if family == "NllbTokenizer" and config.get("legacy_behaviour"):
        return dataclasses.replace(convention, code_before_text=False)
    if family == "M2M100Tokenizer" and config.get("language_codes") == "wmt21":
        return dataclasses.replace(convention, codes=tuple(_WMT21.split()))
    return convention
