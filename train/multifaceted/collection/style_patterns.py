"""Style patterns: regular expressions for the words by which an instruction says how to answer it, by kind.

In most patterns an order to the assistant begins a sentence or follows words that address it, and the words on length,
format, style or audience are in the same sentence. Case is ignored, except inside (?-i:...).
"""

from typing import Literal

Kind = Literal["length", "format", "style", "audience", "role"]

_SAY = (
    "answer|respond|reply|write|rewrite|rephrase|explain|describe|summari[sz]e|give|provide|present|list|tell|show|state|"
    "compose|draft|create|generate|produce|output|return|express|discuss|outline|define|report|craft|prepare|make|put|"
    "format|organi[sz]e|structure|display|arrange|elaborate|paraphrase|deliver|introduce|condense|break|develop|design|"
    "narrate|talk|speak|formulate|simplify|teach|print|compare|analy[sz]e|evaluate|identify|suggest|recommend|convey|"
    "illustrate|clarify|solve|offer|share|record|address"
)
# An order to the assistant: at the start of a sentence or a line, or after words that address it.
_START = (
    r"(?:(?:\A|[.!?:;\n]\s*|[,]\s*(?:and |then |but |please )+)(?:\W|\d)*"
    r"|\b(?:please|kindly|then|also|can you|could you|would you|will you|help me|want you to|need you to|like you to|"
    r"you to|you should|you must|you will|you can|your (?:task|job|goal|role) is to|let's|let’s|and)\s+)"
    r"(?:(?:please|now|then|also|first|just|simply|always|briefly|only|me|us|try to|next)\s+){0,2}"
)
_ORDER = rf"{_START}(?:{_SAY})\b"
_TELL = (
    rf"{_START}(?:explain|describe|write|rewrite|rephrase|paraphrase|summari[sz]e|simplify|teach|present|introduce|tell|"
    r"define|clarify|illustrate|convey|break|compose|draft|craft|create|prepare|narrate|deliver|address|express|answer|"
    r"outline|discuss|speak|talk|formulate|generate|produce)\b"
)
_HAND_OUT = (
    rf"{_START}(?:answer|respond|reply|give|provide|present|output|return|format|write|generate|produce|print|list|show|"
    r"express|structure|organi[sz]e|create)\b"
)
_REST = r"[^.?!\n]"  # of the sentence

_NUMBER = (
    r"(?:\d[\d,]*|one|two|three|four|five|six|seven|eight|nine|ten|twelve|fifteen|twenty|thirty|fifty|a hundred|"
    r"one hundred|two hundred|five hundred|a few|a couple of|several|a single)"
)
_RANGE = rf"{_NUMBER}(?:\s*(?:-|–|to|or|and)\s*{_NUMBER})?"
_UNIT = r"(?:words?|sentences?|paragraphs?|characters|bullet points?|bullets|lines|pages?|stanzas?|tokens)"
_LIMIT = (
    r"(?:just|only|exactly|about|around|approximately|roughly|at most|at least|no more than|not more than|"
    r"no longer than|less than|fewer than|more than|under|"
    r"over|up to|between|a maximum of|maximum|max|a minimum of|minimum|the first)"
)
_LONG_OR_SHORT = (
    r"(?:brief|short|shorter|concise|succinct|detailed|thorough|comprehensive|in-depth|long|lengthy|extensive|one-line|"
    r"compact|elaborate|exhaustive)"
)
_PIECE = (
    r"(?:answers?|response|reply|explanations?|summary|summaries|description|descriptions|overview|paragraph|paragraphs|"
    r"introduction|report|essay|analysis|account|outline|review|feedback|guide|rationale|definition|definitions|"
    r"breakdown|comparison|discussion|instructions|statement|note|abstract|reasoning)"
)
_MANNERS = (
    r"(?:formal|informal|casual|friendly|professional|polite|humorous|funny|witty|sarcastic|satirical|ironic|persuasive|"
    r"heartfelt|conversational|poetic|dramatic|playful|light-?hearted|engaging|creative|empathetic|compassionate|warm|"
    r"neutral|objective|academic|scholarly|journalistic|enthusiastic|upbeat|motivational|inspirational|inspiring|"
    r"romantic|serious|solemn|respectful|courteous|diplomatic|assertive|confident|simple|plain|clear|concise|catchy|"
    r"colloquial|eloquent|flowery|vivid|emotional|nostalgic|whimsical|cheerful|gentle|stern|rude|angry|sad|spooky|"
    r"suspenseful|mysterious|melancholic|melancholy|child-friendly|kid-friendly|easy-to-understand|easy to understand|"
    r"easily understandable|understandable|accessible|non-technical|technical|fun|entertaining|lively|captivating|"
    r"compelling|storytelling|narrative|shakespearean|archaic|modern)"
)
_COLOURS = (
    r"(?:formal|informal|casual|friendly|professional|polite|humorous|funny|hilarious|witty|sarcastic|satirical|"
    r"persuasive|heartfelt|poetic|light-?hearted|engaging|catchy|heart-?warming|romantic|compelling|captivating|"
    r"inspirational|inspiring|motivational|whimsical|suspenseful|spooky|respectful|sincere|diplomatic|eye-catching|"
    r"attention-grabbing|vivid|dramatic|emotional|enthusiastic|entertaining|moving|touching|scary|uplifting)"
)
_TEXTS = (
    r"(?:poem|story|stories|e-?mail|letter|speech|joke|jokes|tweet|message|essay|article|note|review|description|"
    r"introduction|slogan|slogans|toast|song|dialogue|script|reply|response|answer|explanation|post|blog|captions?|"
    r"headlines?|ad|text|paragraph|tale|narrative|summary|invitation|announcement|taglines?|pitch|piece|statement|"
    r"presentation|monologue|limerick|haiku|bio|copy|argument|report)"
)
_DATA = r"(?:json|yaml|xml|csv|tsv|markdown|latex|html)"
_SHAPE = (
    r"(?:tables?|tabular form(?:at)?|numbered lists?|ordered lists?|bulleted lists?|lists?|checklist|outline|poems?|"
    r"haikus?|limericks?|sonnets?|song|rap|rhyme|verse|letter|dialogue|conversation|diary entry|tweet|blog post|essay|"
    r"short story|story|fairy tale|fable|screenplay|script|flow ?chart|mind map|headlines?|slogan|q&a|paragraph form|"
    r"single paragraph|numbered steps|percentage|whole number|fraction|decimal|integer)"
)
_PEOPLE = (
    r"(?:child|children|kids?|toddlers?|teens?|teenagers?|beginners?|novices?|laym[ae]n|lay ?persons?|lay ?people|"
    r"non-?experts?|newcomers?|newbies?|dummies|grandm(?:other|a)|grandfather|grandparents?|five-year-old|"
    r"(?:\w+ )?(?:grader|schooler|student)s?|(?:\w+ )?audiences?|readers?|listeners?|[\w-]+[- ]years?[- ]olds?|"
    r"someone (?:who|with|without|new|unfamiliar)|somebody (?:who|with|without)|people (?:who|with(?:out)?|unfamiliar)|"
    r"those who (?:know|have never)|professionals|experts|engineers|scientists|executives)"
)

PATTERNS: dict[Kind, tuple[str, ...]] = {
    "length": (
        (
            rf"\b(?:in|within|using|to)\s+(?:{_LIMIT}\s+){{0,2}}{_RANGE}\s*(?:short |brief |complete |concise |"
            r"simple )?"
            r"(?:words|word|sentences?|paragraphs?|characters|bullet points?|bullets)\b(?! (?:an? |per |each "
            r")(?:minute|hour|day|page))"
        ),
        rf"{_ORDER}{_REST}{{0,120}}?\b(?:{_LIMIT}\s+){{1,2}}{_RANGE}\s*{_UNIT}\b",
        (
            rf"{_ORDER}{_REST}{{0,60}}?\b{_NUMBER}(?:\s*(?:-|–|to|or)\s*{_NUMBER})?\s+(?:short |brief |complete |"
            r"concise )?"
            r"(?:words|sentences?|paragraphs?|bullet points?|stanzas?)\b(?! (?:from|in|that|which|of|below|above|"
            r"into))"
        ),
        (
            rf"{_ORDER}{_REST}{{0,60}}?\b(?:a|an|the)\s+(?:\w+ )?{_NUMBER}[- ](?:word|sentence|paragraph|line|page|"
            r"character|stanza|verse)\b"
        ),
        r"\b(?:word|character) (?:limit|count)\s*(?:of|is|:|should)",
        rf"\b(?:not|n't) exceed\w*\s+{_NUMBER}",
        rf"\blimit(?:ed)? (?:it|yourself|(?:your|the) \w+) to {_NUMBER}",
        (
            rf"\b(?:briefly|concisely|succinctly) (?:{_SAY})\b|{_START}thoroughly (?:{_SAY})\b|"
            rf"{_START}(?:{_SAY}) (?:briefly|concisely|"
            r"succinctly)\b"
        ),
        (
            rf"{_ORDER}{_REST}{{0,100}}?\b(?:briefly|concisely|succinctly|in (?:brief|a nutshell)|"
            r"in (?:great(?:er)? |more |full |some )?(?:detail|depth)|in as (?:much|few)\b)"
        ),
        (
            rf"{_ORDER}(?: me| us)?(?: with)?(?: a| an| the| some| your)?(?: very| clear,?| "
            rf"more)?\s+{_LONG_OR_SHORT}"
            rf"(?:,? (?:and |but |yet )?[\w-]+){{0,2}}\s+{_PIECE}\b(?! and [\w-]+ (?:plan|strategy|system|program))"
        ),
        (
            rf"\b(?:i (?:need|want|would like)|i'd like|looking for) (?:a|an|some) (?:very )?{_LONG_OR_SHORT} "
            rf"(?:[\w-]+ )?{_PIECE}\b"
        ),
        (
            rf"{_START}(?:keep|make) (?:it|this|them|your \w+|the (?:answer|response|text|reply|explanation|"
            r"summary)|everything) (?:\w+ )?"
            rf"(?:{_LONG_OR_SHORT}\b|to the point\b|(?:under|within|below) {_NUMBER})"
        ),
        (
            r"(?:\A|[.!?;\n]\s*|please |, )be (?:as )?(?:very )?(?:brief|concise|succinct|thorough|detailed|"
            r"specific and brief|short)\b"
        ),
        (
            r"\b(?:ensur(?:e|ing)|make sure|see to it)(?: that)? (?:your|the) (?:answer|response|reply|summary|"
            rf"explanation|description)s? (?:is|are|stays?|remains?) {_LONG_OR_SHORT}\b"
        ),
        (
            r"\b(?:your|the|each) (?:answer|response|reply|output|summary|essay|explanation|description)s? "
            r"(?:should|must|has to|needs to) be"
            rf" (?:\w+ )?(?:{_LONG_OR_SHORT}|{_NUMBER}|{_LIMIT})\b"
        ),
    ),
    "format": (
        (
            r"\b(?:in|as|using|use|with|into|by|through|via) (?:a |the )?(?:[\w-]+ "
            r"){0,2}bullet(?:ed)?(?:[ -]points?|[ -]lists?|"
            r"[ -]form(?:at)?|s)\b|\bbullet[- ]point(?:ed)? (?:list|summary|form(?:at)?)\b|\bbulleted list\b"
        ),
        (
            rf"{_HAND_OUT}{_REST}{{0,120}}?\b(?:in|as|into|using) (?:a |an |valid |proper |the )*{_DATA}\b(?! "
            r"(?:file|data|document|page)s?\b)"
        ),
        rf"\b(?:answer|response|reply|output|result)s? (?:\w+ ){{0,3}}(?:in|as) (?:a |an |valid )*{_DATA}\b",
        (
            rf"{_ORDER}(?!{_REST}{{0,200}}\b(?:function|method|program|python|javascript|java|code|array|"
            rf"sql)\b){_REST}{{0,120}}?"
            rf"\b(?:in the form(?:at)? of|in the shape of|as|in(?:to)?) (?:(?:a|an) )(?:[\w-]+ )?{_SHAPE}\b(?! "
            r"(?:of|tennis|called|named|by|entitled)\b)"
        ),
        (
            rf"{_ORDER}{_REST}{{0,120}}?\bin (?:(?:a|an) )?(?:[\w-]+ )?(?:tabular|table|list|point|paragraph|essay|"
            r"outline|letter|poetic|verse|"
            r"dialogue|email|question|bullet|numbered) (?:form|format)\b"
        ),
        (
            rf"{_ORDER}{_REST}{{0,100}}?\bstep[- ]by[- ]step\b|\b(?:think|derive|reason|work)\b{_REST}{{0,40}}? "
            r"step[- ]by[- ]step\b"
        ),
        (
            r"\b(?:in|follow(?:ing|s)?|use|using|with|to|by) (?:the |this |these |a |an )?(?:exact |same "
            r")?(?:following|specified|given|below|"
            r"requested|required|prescribed) (?:output |answer |response )?(?:format|structure|template|form)\b"
        ),
        (
            r"\bin (?:a |the )?(?:[\"'“]?yes[\"'”]?(?: or |/)[\"'“]?no[\"'”]?) (?:format|form)\b|\bin the "
            r"form(?:at)?(?: of)?:? ?[\[{<(]"
        ),
        (
            rf"{_START}(?:answer|respond|reply|say)\b{_REST}{{0,30}}?\b(?:yes|true)[\"'”]?(?: or |/| and )"
            r"[\"'“]?(?:no|false)\b"
        ),
        (
            r"(?:\A|\n)\W*(?:output|answer|response|desired|reply) format\b|\b(?:output|answer|response|reply) "
            r"format (?:is|should|must|:)|"
            r"\bformat (?:your|the) (?:answer|response|output|reply|result)s?\b"
        ),
        (
            r"\b(?:your |the )?(?:final )?(?:answer|response|output|reply|result)s? (?:should|must|has to|needs to|"
            r"shall) (?:\w+ )?(?:be "
            r"(?:in|given|written|presented|formatted|only|just|a single|either|rounded|structured|returned|"
            r"expressed)|look|follow|begin|start with|end with)\b"
        ),
        (
            rf"{_START}(?:answer|respond|reply|output|return|print|write|give|provide|say|"
            rf"state)\b{_REST}{{0,40}}?\b(?:(?:only|just) (?:with|the|a|an|"
            r"one|in|yes|true|by)|nothing (?:else|but)|without (?:any )?(?:explanation|further)|no (?:explanation|"
            r"other text))\b"
        ),
        (
            r"(?:\A|[.!?;:\n]\s*|please )(?:only|just) (?:answer|respond|reply|output|return|give|provide|say|"
            r"write|print|state)\b"
        ),
        (
            r"\bonly generate\b|\b(?:no|without) (?:any )?(?:explanations?|additional text|commentary) (?:is |are "
            r")?(?:needed|required|necessary)"
        ),
        (
            rf"{_START}(?:answer|respond|reply|say)\b{_REST}{{0,40}}?\b(?:with|by) (?:a |an |either )?[\"'“]?(?:yes|"
            r"true|one word|single word|simple yes)\b"
        ),
        rf"{_ORDER}{_REST}{{0,80}}?\bin (?:one|a single|a) (?:word|letter|number|sentence|line|phrase)\b",
        (
            r"\b(?:do not|don't|don’t|without) (?:use|using|include|including|any) (?:any )?(?:bullet|headings?|"
            r"lists?|markdown|tables?|emojis?|"
            r"punctuation|the letter|jargon|technical (?:terms|jargon))\b"
        ),
        (
            rf"{_ORDER}{_REST}{{0,120}}?\b(?:with|use|using|include|including) (?:clear |appropriate |proper |"
            r"descriptive |separate )*(?:headings|subheadings|"
            r"section headers|sections|numbered points|numbered steps)\b"
        ),
        (
            r"\b(?:in|using) all (?:caps|capital letters|lowercase|uppercase)\b|\b(?:start|begin|end|finish) "
            r"(?:your|the|each) (?:answer|response|reply|"
            r"sentence|paragraph|line|output)s? with\b"
        ),
    ),
    "style": (
        (
            rf"(?:\A|[.!?;\n]\s*|please |, )(?:be|stay|remain|sound) (?:as |very |always |more )*{_MANNERS}\b(?! "
            r"(?:to|about|of|for)\b)"
        ),
        r"\bin the (?:style|voice|tone|manner) of\b",
        (
            r"\b(?:in|using|with|adopt(?:ing)?|maintain(?:ing)?|keep(?:ing)?|use|set) (?:a|an|the) (?:[\w’'-]+,? "
            r"(?:and |yet |but )?){1,4}?tone\b|"
            r"\b(?:tone|style) (?:should|must) be\b|\b(?-i:[A-Z])\w+['’]s? (?:tone|writing style|"
            r"voice)\b(?=[.,!?\n]|\Z)"
        ),
        (
            rf"{_ORDER}{_REST}{{0,140}}?\b(?:in|with|using) (?:a|an|the) (?:[\w’'-]+,? (?:and |yet |but "
            rf")?){{1,4}}?(?:tone|voice|writing style)\b"
        ),
        (
            rf"{_ORDER}{_REST}{{0,140}}?\bin (?:a|an|the) (?:[\w-]+,? (?:and |yet |but )?){{0,2}}{_MANNERS} "
            r"(?:[\w-]+ )?(?:style|manner|way|fashion|language|form|format)\b"
        ),
        (
            rf"{_ORDER}{_REST}{{0,140}}?\bin (?:very |more |really )?(?:simple|simpler|plain|easy|layman['’]?s?|"
            r"laymen['’]?s|basic|everyday|non-technical|lay|formal|"
            r"informal|poetic|flowery|shakespearean|old|modern|colloquial)(?:, [\w-]+)? (?:[\w-]+ )?(?:terms?|"
            r"words?|language|english|concepts|prose)\b"
        ),
        (
            rf"{_START}(?:write|compose|draft|create|craft|generate|prepare|give|tell|produce|deliver)\b(?: me| "
            r"us)?(?: a| an| the| some| your)? "
            rf"(?:[\w-]+,? (?:and |yet |but )?){{0,2}}?{_COLOURS}(?:,? (?:and |yet |but "
            rf")?[\w-]+){{0,3}}?\s+{_TEXTS}\b"
        ),
        (
            rf"{_START}(?:make|keep) (?:it|this|them|the \w+|your \w+) (?:sound |more |as |very |a bit |a little |"
            r"really )*"
            rf"{_MANNERS}\b"
        ),
        (
            r"\b(?:answer|response|reply|output|explanation|essay|story|email|letter|speech|text|tone|language)s? "
            r"(?:should|must|needs to|has to) (?:be |sound |remain |stay )"
            rf"(?:\w+ ){{0,2}}?{_MANNERS}\b"
        ),
        (
            rf"\b(?:use|using) (?:\w+,? (?:and )?){{0,2}}?{_MANNERS}(?:,? (?:and )?\w+)? (?:language|words|terms|"
            r"wording|prose|english)\b"
        ),
        r"\b(?:that|which|must|should|make it|to) rhymes?\b|\bin rhym(?:e|ing)\b",
        (
            rf"{_START}(?:answer|respond|reply|speak|talk|write|explain|say|sound)\b{_REST}{{0,40}}?\blike (?:a|an|"
            r"the|you(?:'re| are| were))\b"
        ),
    ),
    "audience": (
        r"\bbeginner['’]?s? guide\b|\b(?:beginner|kid|child)-friendly\b",
        (
            r"\beli5\b|\blike (?:i(?:['’]m| am| were)|you(?:['’]re| are) (?:talking|speaking|explaining) to|to "
            r"a)\b|\bas (?:if|though) "
            r"(?:(?:i|we)(?:['’]m| am| was| were|['’]re| are)|(?:explaining|addressing|talking|speaking|writing|"
            r"you(?:['’]re| are| were) (?:explaining|talking|speaking|teaching))"
            r"|to (?:a|an|my))\b"
        ),
        (
            r"\b(?:guide|tips|advice|introduction|tutorial|explanation|instructions|steps|overview|plan|program|"
            r"routine|lessons?|exercises?|workouts?|primer|summary|"
            r"course|recipes?|explained|described|written) (?:[\w-]+ ){0,3}?for (?:a |an |the |absolute |complete |"
            r"total )*(?:beginners?|novices?|dummies|lay ?persons?|"
            r"laym[ae]n|lay ?people|non-?experts?|children|kids)\b"
        ),
        (
            rf"{_TELL}{_REST}{{0,140}}?(?<!good )(?<!best )(?<!better )(?<!safe )(?<!easy )(?<!designed )(?<!intended )"
            r"(?<!important )\b(?:to|for) (?:a |an |my |the |your |our |young |younger |small )*"
            rf"(?:[\w-]+ )?{_PEOPLE}\b"
        ),
        (
            rf"{_TELL}{_REST}{{0,140}}?\b(?:suitable|appropriate|accessible|understandable|aimed|geared) (?:for|to|"
            r"at|towards?) "
            rf"(?:a |an |the |both |young |all )*(?:[\w-]+ )?{_PEOPLE}\b"
        ),
        (
            r"\b(?:my|your|target|intended) (?:target |intended )?(?:audience|readers?|readership)(?: (?:is|"
            r"are|will|consists)\b|:)|\byour (?:audience|readers)\b"
        ),
        (
            r"\bi(?:['’]m| am) (?:a |an )?(?:\w+ )?(?:beginner|novice|layman|layperson|newbie|\w+[- ]years?[- ]old|"
            r"no expert|not an expert|new to)\b"
        ),
        (
            r"\b(?:so that|such that|so|that|which) (?:a|an|my|even a|any) (?:[\w-]+ ){0,2}(?:child|kid|"
            r"\w+[- ]years?[- ]old|layperson|layman|beginner|grader|student) "
            r"(?:can|could|would|will|might|understands?)\b|\ba (?:[\w-]+ )?(?:child|kid|year[- ]old|grader|layman|"
            r"beginner) (?:can|could|would|will|might) (?:easily )?understand\b"
        ),
    ),
    "role": (
        (
            rf"(?:{_START}|\bplease )(?:act|behave|answer|respond|reply|speak|talk|write) as (?:if you|though you|a|"
            r"an|the|my|(?-i:[A-Z]))"
        ),
        (
            r"\b(?:pretend|imagine|suppose|assume|consider)(?: that)? (?:you(?:['’]re| are| were)|to be|"
            r"yourself)(?! (?:given|in|on|at|driving|going|playing|walking|"
            r"planning|buying|trying|to|have|able|asked|at)\b)"
        ),
        (
            r"(?:\A|[.!?\n]\s*)you(?:['’]re| are) (?:a|an|the|my|now a|now an) (?:[\w’'-]+[ ,]+){0,6}?"
            r"(?:\w*(?:er|or|ist|ian|ant|ent|man|woman|expert|chef|coach|guide|assistant|tutor|nurse|judge|critic|"
            r"poet|detective|pirate|robot|bot|ai|model|architect|analyst|"
            r"spokesperson|representative|specialist|professional|executive|host|king|queen|librarian|pilot|"
            r"captain|lawyer|attorney|diplomat))\b(?! (?:in a|who (?:is|has) to))"
        ),
        r"\A\W*you(?:['’]re| are) (?:(?-i:[A-Z])[\w.’'-]+ ){1,3}",
        r"\A\W*as (?-i:[A-Z])[\w.’'-]+(?: (?-i:[A-Z])[\w.’'-]+){0,3}, you",
        r"\bas (?:if|though) you(?:['’]re| are| were) (?:a|an|the|captain|(?-i:[A-Z]))",
        (
            r"\byour role (?:is|as|will)\b|\b(?:you will|you(?:'ll)?|please|to) (?:play|take on|assume|adopt) the "
            r"(?:role|part|persona|identity) of\b|"
            r"\brole-?play(?:ing)? as\b|\btake on the (?:role|persona) of\b"
        ),
        r"\bfrom the (?:perspective|point of view|viewpoint|standpoint) of (?:a|an|the|(?-i:[A-Z]))",
        (
            rf"(?:\A|\n)\W*as (?:a|an|the) (?:[\w-]+ ){{1,5}}?[\w-]+, (?:please |you |your |how (?:would|do) you |"
            rf"what (?:would|do) you |(?:{_SAY})\b)"
        ),
    ),
}
