"""Rules, word lists and random generators behind the kana-to-romaji example model.

The function `romanize` is the authority on the spelling: it turns hiragana and katakana into modified-Hepburn romaji
by table and rule. The rest of the module writes training text: random kana words with roughly Japanese mora
frequencies, everyday words, sentence patterns, and the hash that decides which words are held out of training. It
knows no kanji, does not look words up (so おもう becomes "omō", and the particles は, へ and を are written ha, he and
wo), and needs nothing beyond the standard library.
"""

from __future__ import annotations

import hashlib
import random
import unicodedata
from collections.abc import Sequence

_ROWS = {
    "": "あいうえお", "k": "かきくけこ", "g": "がぎぐげご", "s": "さしすせそ", "z": "ざじずぜぞ", "t": "たちつてと",
    "d": "だぢづでど", "n": "なにぬねの", "h": "はひふへほ", "b": "ばびぶべぼ", "p": "ぱぴぷぺぽ", "m": "まみむめも",
    "r": "らりるれろ",
}  # fmt: skip
_IRREGULAR = {
    "し": "shi", "じ": "ji", "ち": "chi", "つ": "tsu", "ぢ": "ji", "づ": "zu", "ふ": "fu", "や": "ya", "ゆ": "yu",
    "よ": "yo", "わ": "wa", "ゐ": "i", "ゑ": "e", "を": "wo", "ゔ": "vu",
}  # fmt: skip
_YOUON = {
    "き": "ky", "ぎ": "gy", "し": "sh", "じ": "j", "ち": "ch", "ぢ": "j", "に": "ny", "ひ": "hy", "び": "by",
    "ぴ": "py", "み": "my", "り": "ry",
}  # fmt: skip
_EXTENDED = {
    "いぇ": "ye", "うぃ": "wi", "うぇ": "we", "うぉ": "wo", "くぁ": "kwa", "くぃ": "kwi", "くぇ": "kwe", "くぉ": "kwo",
    "くゎ": "kwa", "ぐぁ": "gwa", "ぐゎ": "gwa", "しぇ": "she", "じぇ": "je", "すぃ": "si", "ずぃ": "zi", "ちぇ": "che",
    "つぁ": "tsa", "つぃ": "tsi", "つぇ": "tse", "つぉ": "tso", "てぃ": "ti", "てゅ": "tyu", "でぃ": "di",
    "でゅ": "dyu", "とぅ": "tu", "どぅ": "du", "ふぁ": "fa", "ふぃ": "fi", "ふぇ": "fe", "ふぉ": "fo", "ふゅ": "fyu",
    "ゔぁ": "va", "ゔぃ": "vi", "ゔぇ": "ve", "ゔぉ": "vo", "ゔゅ": "vyu",
}  # fmt: skip
# A small kana that forms no pair with the kana before it is read like its full-size form (まぁ -> mā).
_FULL_SIZE = dict(zip("ぁぃぅぇぉゃゅょゎゕゖ", "あいうえおやゆよわかけ", strict=True))
_LENGTHENED_BY = {"a": "あ", "i": "", "u": "う", "e": "え", "o": "おう"}
_MACRON = dict(zip("aiueo", "āīūēō", strict=True))
_MARKS = {"、": ",", "。": ".", "・": " ", "「": '"', "」": '"'}
# Japanese text writes no space after these marks, romaji does.
_SPACED_MARKS = "、。?!」"
_NO_SPACE_BEFORE = " 、。,.?!」"


def _build_table() -> dict[str, str]:
    table = {kana: row + vowel for row, column in _ROWS.items() for kana, vowel in zip(column, "aiueo", strict=True)}
    table.update(_IRREGULAR)
    for first, onset in _YOUON.items():
        table.update({first + small: onset + vowel for small, vowel in zip("ゃゅょ", "auo", strict=True)})
        # し, じ and ち take no y: しゃ is sha but きゃ is kya, both fall out of the onsets above.
    table.update(_EXTENDED)
    return table


MORAE: dict[str, str] = _build_table()
PUNCTUATION = "、。「」・ー,.?!'\"-"
VOCAB_SIZE = 512


def to_hiragana(text: str) -> str:
    """Returns the text with every katakana letter replaced by the matching hiragana letter."""
    return "".join(chr(ord(char) - 0x60) if "ァ" <= char <= "ヶ" else char for char in text)


def to_katakana(text: str) -> str:
    """Returns the text with every hiragana letter replaced by the matching katakana letter."""
    return "".join(chr(ord(char) + 0x60) if "ぁ" <= char <= "ゖ" else char for char in text)


def _mora_at(text: str, position: int) -> tuple[str, str]:
    """Returns the longest mora that starts at a position and its romaji, or two empty strings."""
    for length in (2, 1):
        kana = text[position : position + length]
        if kana in MORAE:
            return kana, MORAE[kana]
    kana = text[position : position + 1]
    return (kana, MORAE[_FULL_SIZE[kana]]) if kana in _FULL_SIZE else ("", "")


def _is_lengthened(text: str, position: int, kana: str, vowel: str) -> bool:
    """Tells whether the letter at a position only makes the vowel before it long."""
    if text[position : position + 1] == "ー":
        return True
    following, _ = _mora_at(text, position)
    # を is a particle, so a vowel after it begins another word; うぃ after おう's お is a mora of its own.
    return kana != "を" and len(following) == 1 and _FULL_SIZE.get(following, following) in _LENGTHENED_BY[vowel]


def romanize(text: str) -> str:
    """Transliterates kana to modified-Hepburn romaji in lower case.

    The text is normalised (NFKC) first and runs of spaces become one space. Rules, in short: っ doubles the next
    consonant (t before ch) and is an apostrophe where there is none to double; おう, おお, うう, ああ and ええ become
    a macron vowel, いい stays ii, えい stays ei, and ー lengthens any vowel; ん is n, and n' before a vowel or y; one
    space follows 、 。 ? ! 」 when more text does, and one stands before 「. What is neither kana nor a known mark
    passes through.

    Args:
        text: Words or a sentence in hiragana or katakana.

    Returns:
        The romaji.
    """
    source = to_hiragana(" ".join(unicodedata.normalize("NFKC", text).lower().split()))
    output: list[str] = []
    position = 0
    while position < len(source):
        char = source[position]
        kana, romaji = _mora_at(source, position)
        if kana:
            position += len(kana)
            vowel = romaji[-1]
            if _is_lengthened(source, position, kana, vowel):
                romaji = romaji[:-1] + _MACRON[vowel]
                position += 1
            output.append(romaji)
            continue
        position += 1
        _, following = _mora_at(source, position)
        if char == "っ":
            if source[position : position + 1] == "っ":
                continue  # a run of っ counts once
            doubled = "t" if following.startswith("ch") else following[:1]
            output.append("'" if doubled in {"", *"aiueo"} else doubled)
        elif char == "ん":
            output.append("n'" if following[:1] in {*"aiueoy"} else "n")
        elif char != "ー":  # a ー with no vowel left to lengthen says nothing
            spaced = char in _SPACED_MARKS and source[position : position + 1] not in {"", *_NO_SPACE_BEFORE}
            output.append((" " if char == "「" else "") + _MARKS.get(char, char) + (" " if spaced else ""))
    return " ".join("".join(output).split())


def vocabulary() -> list[str]:
    """Lists the pieces: special ones, kana, marks, digits, letters, and every mora in romaji, short and long.

    One piece per mora keeps source and target about equally long, which a small model copies more reliably than
    letters, and keeps a 48-character sentence within the 96 tokens that generation allows.
    """
    long_vowel = str.maketrans("aiueo", "āīūēō")
    kana = [chr(code) for start in (0x3041, 0x30A1) for code in range(start, start + 86)]
    morae = sorted({romaji for romaji in MORAE.values() if len(romaji) > 1})
    pieces = ["<pad>", "</s>", "<unk>", "▁", *PUNCTUATION, *"0123456789", *"abcdefghijklmnopqrstuvwxyzāīūēō", *kana]
    pieces += morae + [romaji.translate(long_vowel) for romaji in morae]
    # A round number of rows suits matrix units; the spare pieces are letter pairs that no romaji text contains.
    spare = (first + second for first in "qxl" for second in "bcdfghjklmnpqrstvwxz")
    while len(pieces) < VOCAB_SIZE:
        pieces.append(next(spare))
    return pieces


def is_held_out(word: str) -> bool:
    """Tells whether a word belongs to the held-out twentieth, whichever kana script it is written in."""
    digest = hashlib.blake2b(to_hiragana(word).encode("utf-8"), digest_size=4).digest()
    return int.from_bytes(digest, "big") % 20 == 0


def _words(text: str) -> list[str]:
    return text.split()


NOUNS = _words("""
わたし ぼく あなた かれ かのじょ みんな ともだち かぞく おとうさん おかあさん おにいさん おねえさん おとうと いもうと
おじいさん おばあさん こども あかちゃん せんせい がくせい いしゃ かいしゃいん おきゃくさん となり ひと おとこ おんな
なまえ いえ へや まど とびら かべ やね にわ げんかん だいどころ おふろ かいだん つくえ いす たな ほん ざっし しんぶん
じしょ てがみ きって はがき えんぴつ けしごむ かみ はさみ かばん さいふ かぎ とけい めがね ぼうし くつ くつした ふく
きもの ゆびわ かさ でんわ でんき でんち でんしゃ じてんしゃ じどうしゃ ひこうき ふね ちかてつ えき くうこう みなと
みち はし こうさてん びょういん がっこう だいがく としょかん びじゅつかん ゆうびんきょく ぎんこう しやくしょ こうえん
どうぶつえん やおや ほんや さかなや ぱんや きっさてん りょうり ごはん あさごはん ひるごはん ばんごはん おべんとう
おにぎり みそしる さしみ てんぷら うどん そば やさい にんじん たまねぎ きゅうり なす とうもろこし くだもの りんご
みかん ぶどう いちご もも すいか にく とりにく さかな たまご とうふ ぎゅうにゅう おちゃ こうちゃ みず おゆ おさけ しお
さとう しょうゆ おかし せんべい ようかん だんご あめ いぬ ねこ とり うま うし ぶた さる うさぎ きつね たぬき くま ぞう
きりん かめ かえる ちょうちょう せみ とんぼ あり はな さくら もみじ き くさ はっぱ もり やま かわ うみ みずうみ しま
そら くも つき ほし たいよう あめふり ゆき かぜ たいふう じしん はる なつ あき ふゆ きょう あした きのう あさって
おととい まいにち らいしゅう せんしゅう こんげつ きょねん ことし らいねん あさ ひる ゆうがた よる じかん しゅくだい
しけん もんだい こたえ しつもん れんしゅう べんきょう しごと かいぎ やくそく りょこう おみやげ しゃしん えいが
おんがく うた え まんが ゆめ うそ ひみつ こころ からだ あたま かお め みみ くち は て あし おなか せなか びょうき
くすり ねつ にほん とうきょう おおさか きょうと ほっかいどう おきなわ ふじさん しんかんせん おんせん まつり はなび
おしょうがつ たんじょうび けっこんしき きっぷ ちゅうしゃじょう しんごう せんたくき れいぞうこ そうじき ほうちょう
なっとう らっきょう がんばり しんあい きんえん ほんやく げんいん ぜんいん てんいん ざいりょう りょうしん りゅうがく
きゃく ひゃくえん ぎょうざ みょうじ にゅうがく ぴょんぴょん びょうぶ じゅぎょう じょうず おおかみ こおり とおり ほのお
おおぜい アイスクリーム アパート アメリカ アルバイト イギリス インターネット インク ウイスキー エアコン エレベーター
オーストラリア オートバイ オレンジ カーテン カード カップ カナダ カフェ カメラ カレーライス ガソリン ガラス キッチン
ギター クラス クリスマス グループ ケーキ ゲーム コーヒー コート コップ コピー コンサート コンビニ コンピューター
サッカー サラダ サンドイッチ シャツ シャワー ジュース ジェットコースター スーパー スープ スカート スキー スプーン
スポーツ スマートフォン セーター ソファー ソフトウェア タクシー チーズ チェック チケット チョコレート テーブル テスト
テニス テレビ デパート ディズニー ドア ドイツ ドラマ ドレス ナイフ ニュース ネクタイ ノート ハンカチ ハンバーガー バス
バター バッグ バナナ バイオリン パーティー パスポート パソコン パン ビール ビル ピアノ ピザ ファイル ファックス
フィルム フォーク フランス ブラウス プール プレゼント ベッド ベルト ペン ペット ホテル ボール ボタン ポケット マッチ
マンション ミルク メール メートル メニュー モーター ヨーロッパ ヨーグルト ライオン ラーメン ラジオ リュックサック
ルール レストラン レモン ロシア ロボット ワイン ワイシャツ ヴァイオリン ヴィーナス ウィーン ウェブサイト シェフ
ジェスチャー チェロ ツェッペリン デュエット フュージョン ティッシュ キャンプ キャベツ シャンプー ショッピング チャンス
チューリップ ニューヨーク ヒューマン ピューマ ミュージアム リュート ギャラリー ジャケット ジョギング ビュッフェ
スイッチ バッハ スタッフ キッズ
""")
VERBS = _words("""
いきます きます かえります たべます のみます みます よみます かきます ききます はなします かいます うります あいます
まちます つくります つかいます べんきょうします りょうりします さんぽします そうじします おきます ねます はたらきます
やすみます あそびます およぎます はしります あるきます のります おります あけます しめます いれます だします
おしえます ならいます おぼえます わすれます おもいます しっています わかりました できませんでした いきました
たべました のみました みました かいました もらいました あげました くれました なりました はじまりました おわりました
いきたいです たべたいです のみたいです みたいです かってください まってください みせてください いってはいけません
たべてもいいですか いこう たべよう のもう かえろう いった たべちゃった かっておきます おもった とおります こおります
いらっしゃいます おっしゃいました なくなっちゃった がんばって さがしています すわっています たっています
""")
ADJECTIVES = _words("""
おおきい ちいさい たかい やすい あたらしい ふるい いい わるい あつい さむい つめたい あたたかい すずしい おいしい
まずい あまい からい しょっぱい おもしろい つまらない たのしい うれしい かなしい さびしい むずかしい やさしい
いそがしい はやい おそい ながい みじかい ちかい とおい おおい すくない つよい よわい かわいい うつくしい あかい あおい
しろい くろい きいろい げんきな きれいな しずかな にぎやかな べんりな ゆうめいな しんせつな たいせつな じょうぶな
りっぱな すてきな ハンサムな モダンな ユニークな
""")
ADVERBS = _words("""
とても すこし ちょっと たくさん もっと ずっと やっと きっと ぜったい たぶん ときどき いつも よく ぜんぜん あまり もう
まだ すぐ ゆっくり はやく いっしょに ひとりで じょうずに ほんとうに どうして なぜ いつか さっき きょう あした きのう
こんばん けさ まいあさ まいばん らいしゅう にちようびに げつようびに どようびに はじめて やっぱり とうとう だんだん
びっくりして
""")
PHRASES = _words("""
おはよう おはようございます こんにちは こんばんは おやすみなさい さようなら ありがとう ありがとうございます
どういたしまして すみません ごめんなさい はじめまして どうぞよろしく いただきます ごちそうさまでした いってきます
いってらっしゃい ただいま おかえりなさい はい いいえ ええ うん もしもし おめでとう いらっしゃいませ おだいじに
きをつけて ひさしぶりですね そうですね なるほど だいじょうぶです もちろん がんばってください しつれいします
おまたせしました わあ えっ あっ ねえ まあ ほら そうか へえ ああ おーい やったー うーん
""")
COUNTERS = _words("じ ふん えん にん さい がつ にち ねん かい まい こ ばん メートル キロ ページ パーセント")

# N noun, V verb, A adjective, R adverb, P phrase, C number with its counter; everything else stands for itself.
PATTERNS = """
Nは Nです。|Nは Nでは ありません。|Nは Aです。|Aです。|Nが V。|Nを V。|Nで Nを V。|Nへ V。|Nに V。|Nと Nへ V。|
Nは Nが すきです。|Nは Rが きらいです。|R Nを V。|R V。|A Nですね。|A Nを V。|A Nが あります。|Nに Nが あります。|
Nに Nが います。|Nから Nまで V。|Nの Nは A。|Nの Nを V。|Nも Nも V。|Nや Nを V。|P、Nです。|P。|P!|P、V。|
P。Nは Aですか?|Nは どこですか?|Nは なんですか。|なにを V か?|いつ Nへ V か?|Nより Nの ほうが Aです。|V から、Nを V。|
Nが A から、V。|Nを V とき、Nが V。|「P」と いいました。|NはNがすきです。|NのNをV。|Nは、NでV。|NとNのNはA。|
「N」と いう Nを V。|N・Nは A です。|N、N、Nを V。|C に Nへ V。|Cの Nを V。|いま Cです。|NはCです。|N は C まで V。|
ねえ、Nを V?|わあ、A Nだ!|Nって なんですか?|N N N|N N|N、N|N?|Nだよ、Nじゃないよ。|R、Nは R Nを Nに V。|
Nは R Aですが、Nは R Aです。|Nの Nの Nで、Nと Nを V。|A Nと A Nが Nで V。|P、P。|Nお Nう|A A N|V V N
""".replace("\n", "").split("|")

_WEIGHTED = {
    12: "いうんし", 10: "かのとたく", 8: "きてなにこつるおす", 6: "まはがりもらさあちせけよ", 5: "れだでじえそわみろ",
    4: "めひやほゆばごふぶどずねげ", 2: "びむぜぼぎべへざぐぱぷぽ", 1: "ぞぴぺぬづぢをゐゑゔ",
}  # fmt: skip
_SINGLES = [kana for weight, group in _WEIGHTED.items() for kana in group.replace("ん", "") * weight]
_YOUON_MORAE = [kana for kana in MORAE if len(kana) == 2 and kana not in _EXTENDED]
_EXTENDED_MORAE = [*_EXTENDED, "ゔ"]
_ALL_MORAE = list(MORAE)
_VOWELS_AND_Y: list[str] = [*"あいうえおやゆよ", "いぇ"]
_DOUBLED = [kana for kana in _SINGLES if MORAE[kana][0] in "kstpc"]
_DOUBLED_RARELY: list[str] = [*"ちちち", "ちゃ", "ちゅ", "ちょ", "しゃ", "しょ"]
_LONG_SPELLINGS = {"a": "あ", "i": "い", "u": "う", "e": "いえ", "o": "うううお"}


def _random_mora(rng: random.Random, katakana: bool, before: str) -> str:
    if before == "っ" and rng.random() < 0.85:
        return rng.choice(_DOUBLED if rng.random() < 0.8 else _DOUBLED_RARELY)
    if before == "ん" and rng.random() < 0.3:
        return rng.choice(_VOWELS_AND_Y)
    draw = rng.random()
    if draw < 0.03:
        return rng.choice(_ALL_MORAE)
    if draw < 0.17:
        return rng.choice(_YOUON_MORAE)
    if draw < (0.32 if katakana else 0.18):
        return rng.choice(_EXTENDED_MORAE)
    return rng.choice(_SINGLES)


def random_word(rng: random.Random) -> str:
    """Writes a random word of 1 to 14 morae, in hiragana, katakana or, rarely, both."""
    katakana = rng.random() < 0.42
    target = min(rng.randint(1, 14), rng.randint(1, 14)) if rng.random() < 0.7 else rng.randint(1, 14)
    morae: list[str] = []
    while len(morae) < target:
        before = morae[-1] if morae else ""
        mora = _random_mora(rng, katakana, before)
        morae.append(mora)
        vowel = MORAE[mora][-1]
        if rng.random() < 0.16:
            with_mark = rng.random() < (0.85 if katakana else 0.08)
            morae.append("ー" if with_mark else rng.choice(_LONG_SPELLINGS[vowel]))
        draw = rng.random()
        if draw < 0.11:
            morae.append("ん")
        elif draw < 0.19:
            morae.append("っ")
        elif draw < 0.197:
            morae.append(rng.choice([*_FULL_SIZE]))
    if morae[-1] == "っ" and rng.random() < 0.8:
        morae.append(rng.choice("たてと"))
    morae = morae[:14]
    cut = rng.randrange(len(morae)) if rng.random() < 0.04 else len(morae)
    head, tail = "".join(morae[:cut]), "".join(morae[cut:])
    return to_katakana(head) + to_hiragana(tail) if katakana else to_hiragana(head) + to_katakana(tail)


def _training_noun(rng: random.Random) -> str:
    while True:
        word = rng.choice(NOUNS) if rng.random() < 0.4 else random_word(rng)
        if not is_held_out(word):
            return word


def random_sentence(rng: random.Random, words: Sequence[str] = (), max_chars: int = 48) -> str:
    """Writes a random sentence, or two, from patterns, the word lists and random words.

    Args:
        rng: Source of randomness.
        words: Nouns to use, at least one in every sentence. Without any, nouns are everyday and random words that
            are not held out: the bare noun decides, since with its particle (カメラは) it hashes differently.
        max_chars: Longest sentence to return, in characters.

    Returns:
        The sentence in kana.
    """
    patterns = [pattern for pattern in PATTERNS if "N" in pattern] if words else PATTERNS
    fillers = {"V": VERBS, "A": ADJECTIVES, "R": ADVERBS, "P": PHRASES}
    while True:
        pieces: list[str] = []
        for char in rng.choice(patterns) + (rng.choice(["", " "]) + rng.choice(patterns) if rng.random() < 0.2 else ""):
            if char == "N":
                pieces.append(rng.choice(words) if words else _training_noun(rng))
            elif char == "C":
                pieces.append(str(rng.randrange(10 ** rng.randint(1, 4))) + rng.choice(COUNTERS))
            else:
                pieces.append(rng.choice(fillers[char]) if char in fillers else char)
        sentence = "".join(pieces)
        if rng.random() < 0.1:
            sentence = sentence.rstrip("。")
        if len(sentence) <= max_chars:
            return sentence
