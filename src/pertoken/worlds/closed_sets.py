"""Closed sets with all their members: what can be asked as a list, and judged without a judge.

`SETS` says what a list of each is called; `members` gives the names of a set, other names of the same thing mapped to
one by `name_of`. `DEVELOPMENT` are further sets, for trying things. Facts, written down here.
"""

from __future__ import annotations

_TEXTS = {
    "states of the USA": (
        "Alabama|Alaska|Arizona|Arkansas|California|Colorado|Connecticut|Delaware|Florida|Georgia|Hawaii|Idaho|"
        "Illinois|Indiana|Iowa|Kansas|Kentucky|Louisiana|Maine|Maryland|Massachusetts|Michigan|Minnesota|"
        "Mississippi|Missouri|Montana|Nebraska|Nevada|New Hampshire|New Jersey|New Mexico|New York|"
        "North Carolina|North Dakota|Ohio|Oklahoma|Oregon|Pennsylvania|Rhode Island|South Carolina|South Dakota|"
        "Tennessee|Texas|Utah|Vermont|Virginia|Washington|West Virginia|Wisconsin|Wyoming"
    ),
    "chemical elements": (
        "hydrogen|helium|lithium|beryllium|boron|carbon|nitrogen|oxygen|fluorine|neon|sodium|magnesium|aluminum|"
        "aluminium|silicon|phosphorus|sulfur|sulphur|chlorine|argon|potassium|calcium|scandium|titanium|vanadium|"
        "chromium|manganese|iron|cobalt|nickel|copper|zinc|gallium|germanium|arsenic|selenium|bromine|krypton|"
        "rubidium|strontium|yttrium|zirconium|niobium|molybdenum|technetium|ruthenium|rhodium|palladium|silver|"
        "cadmium|indium|tin|antimony|tellurium|iodine|xenon|cesium|caesium|barium|lanthanum|cerium|praseodymium|"
        "neodymium|promethium|samarium|europium|gadolinium|terbium|dysprosium|holmium|erbium|thulium|ytterbium|"
        "lutetium|hafnium|tantalum|tungsten|rhenium|osmium|iridium|platinum|gold|mercury|thallium|lead|bismuth|"
        "polonium|astatine|radon|francium|radium|actinium|thorium|protactinium|uranium|neptunium|plutonium|"
        "americium|curium|berkelium|californium|einsteinium|fermium|mendelevium|nobelium|lawrencium|"
        "rutherfordium|dubnium|seaborgium|bohrium|hassium|meitnerium|darmstadtium|roentgenium|copernicium|"
        "nihonium|flerovium|moscovium|livermorium|tennessine|oganesson"
    ),
    "Greek letters": (
        "alpha|beta|gamma|delta|epsilon|zeta|eta|theta|iota|kappa|lambda|mu|nu|xi|omicron|pi|rho|sigma|tau|"
        "upsilon|phi|chi|psi|omega"
    ),
    "countries in Europe": (
        "Albania|Andorra|Armenia|Austria|Azerbaijan|Belarus|Belgium|Bosnia and Herzegovina|Bulgaria|Croatia|"
        "Cyprus|Czech Republic|Czechia|Denmark|Estonia|Finland|France|Georgia|Germany|Greece|Hungary|Iceland|"
        "Ireland|Italy|Kazakhstan|Kosovo|Latvia|Liechtenstein|Lithuania|Luxembourg|Malta|Moldova|Monaco|"
        "Montenegro|Netherlands|The Netherlands|North Macedonia|Macedonia|Norway|Poland|Portugal|Romania|Russia|"
        "San Marino|Serbia|Slovakia|Slovenia|Spain|Sweden|Switzerland|Turkey|Ukraine|United Kingdom|England|"
        "Scotland|Wales|Northern Ireland|Vatican City"
    ),
    "countries in Africa": (
        "Algeria|Angola|Benin|Botswana|Burkina Faso|Burundi|Cameroon|Cape Verde|Central African Republic|Chad|"
        "Comoros|Congo|Democratic Republic of the Congo|Djibouti|Egypt|Equatorial Guinea|Eritrea|Eswatini|"
        "Swaziland|Ethiopia|Gabon|Gambia|The Gambia|Ghana|Guinea|Guinea-Bissau|Ivory Coast|Kenya|Lesotho|Liberia|"
        "Libya|Madagascar|Malawi|Mali|Mauritania|Mauritius|Morocco|Mozambique|Namibia|Niger|Nigeria|Rwanda|"
        "Senegal|Seychelles|Sierra Leone|Somalia|South Africa|South Sudan|Sudan|Tanzania|Togo|Tunisia|Uganda|"
        "Zambia|Zimbabwe"
    ),
    "countries in Asia": (
        "Afghanistan|Armenia|Azerbaijan|Bahrain|Bangladesh|Bhutan|Brunei|Cambodia|China|Cyprus|East Timor|"
        "Georgia|India|Indonesia|Iran|Iraq|Israel|Japan|Jordan|Kazakhstan|Kuwait|Kyrgyzstan|Laos|Lebanon|"
        "Malaysia|Maldives|Mongolia|Myanmar|Burma|Nepal|North Korea|Oman|Pakistan|Palestine|Philippines|"
        "The Philippines|Qatar|Russia|Saudi Arabia|Singapore|South Korea|Sri Lanka|Syria|Taiwan|Tajikistan|"
        "Thailand|Turkey|Turkmenistan|United Arab Emirates|Uzbekistan|Vietnam|Yemen"
    ),
    "presidents of the United States": (
        "George Washington|John Adams|Thomas Jefferson|James Madison|James Monroe|John Quincy Adams|"
        "Andrew Jackson|Martin Van Buren|William Henry Harrison|John Tyler|James K. Polk|James Polk|"
        "Zachary Taylor|Millard Fillmore|Franklin Pierce|James Buchanan|Abraham Lincoln|Andrew Johnson|"
        "Ulysses S. Grant|Ulysses Grant|Rutherford B. Hayes|James A. Garfield|James Garfield|Chester A. Arthur|"
        "Chester Arthur|Grover Cleveland|Benjamin Harrison|William McKinley|Theodore Roosevelt|"
        "William Howard Taft|Woodrow Wilson|Warren G. Harding|Warren Harding|Calvin Coolidge|Herbert Hoover|"
        "Franklin D. Roosevelt|Franklin Roosevelt|Harry S. Truman|Harry Truman|Dwight D. Eisenhower|"
        "Dwight Eisenhower|John F. Kennedy|John Kennedy|Lyndon B. Johnson|Lyndon Johnson|Richard Nixon|"
        "Gerald Ford|Jimmy Carter|Ronald Reagan|George H. W. Bush|George H.W. Bush|Bill Clinton|George W. Bush|"
        "George Bush|Barack Obama|Donald Trump|Joe Biden"
    ),
    "letters of the NATO alphabet": (
        "Alfa|Alpha|Bravo|Charlie|Delta|Echo|Foxtrot|Golf|Hotel|India|Juliett|Juliet|Kilo|Lima|Mike|November|"
        "Oscar|Papa|Quebec|Romeo|Sierra|Tango|Uniform|Victor|Whiskey|X-ray|Xray|Yankee|Zulu"
    ),
    "provinces of France": (
        "Alsace|Aquitaine|Auvergne|Brittany|Burgundy|Champagne|Corsica|Lorraine|Limousin|Normandy|Picardy|"
        "Provence|Languedoc|Poitou|Anjou|Maine|Touraine|Berry|Gascony|Dauphiné|Savoy|Artois|Flanders|Béarn|Foix|"
        "Roussillon|Lyonnais|Marche|Bourbonnais|Nivernais|Orléanais|Saintonge|Angoumois|Aunis|Franche-Comté|"
        "Île-de-France|Comtat Venaissin|Nice"
    ),
    "counties of England": (
        "Bedfordshire|Berkshire|Bristol|Buckinghamshire|Cambridgeshire|Cheshire|Cornwall|Cumberland|Cumbria|"
        "Derbyshire|Devon|Dorset|Durham|County Durham|East Sussex|West Sussex|Sussex|Essex|Gloucestershire|"
        "Greater London|London|Greater Manchester|Hampshire|Herefordshire|Hertfordshire|Huntingdonshire|"
        "Isle of Wight|Kent|Lancashire|Leicestershire|Lincolnshire|Merseyside|Middlesex|Norfolk|Northamptonshire|"
        "Northumberland|North Yorkshire|South Yorkshire|West Yorkshire|East Riding of Yorkshire|Yorkshire|"
        "Nottinghamshire|Oxfordshire|Rutland|Shropshire|Somerset|Staffordshire|Suffolk|Surrey|Tyne and Wear|"
        "Warwickshire|West Midlands|Westmorland|Wiltshire|Worcestershire"
    ),
}
_DEVELOPMENT_TEXTS = {
    "capitals of the states of the USA": (
        "Montgomery|Juneau|Phoenix|Little Rock|Sacramento|Denver|Hartford|Dover|Tallahassee|Atlanta|Honolulu|Boise|"
        "Springfield|Indianapolis|Des Moines|Topeka|Frankfort|Baton Rouge|Augusta|Annapolis|Boston|Lansing|"
        "Saint Paul|St. Paul|Jackson|Jefferson City|Helena|Lincoln|Carson City|Concord|Trenton|Santa Fe|Albany|"
        "Raleigh|Bismarck|Columbus|Oklahoma City|Salem|Harrisburg|Providence|Columbia|Pierre|Nashville|Austin|"
        "Salt Lake City|Montpelier|Richmond|Olympia|Charleston|Madison|Cheyenne"
    ),
    "books of the Bible": (
        "Genesis|Exodus|Leviticus|Numbers|Deuteronomy|Joshua|Judges|Ruth|1 Samuel|2 Samuel|Samuel|1 Kings|2 Kings|"
        "Kings|1 Chronicles|2 Chronicles|Chronicles|Ezra|Nehemiah|Esther|Job|Psalms|Psalm|Proverbs|Ecclesiastes|"
        "Song of Solomon|Song of Songs|Isaiah|Jeremiah|Lamentations|Ezekiel|Daniel|Hosea|Joel|Amos|Obadiah|Jonah|"
        "Micah|Nahum|Habakkuk|Zephaniah|Haggai|Zechariah|Malachi|Matthew|Mark|Luke|John|Acts|Romans|1 Corinthians|"
        "2 Corinthians|Corinthians|Galatians|Ephesians|Philippians|Colossians|1 Thessalonians|2 Thessalonians|"
        "Thessalonians|1 Timothy|2 Timothy|Timothy|Titus|Philemon|Hebrews|James|1 Peter|2 Peter|Peter|1 John|2 John|"
        "3 John|Jude|Revelation"
    ),
    "plays by William Shakespeare": (
        "All's Well That Ends Well|Antony and Cleopatra|As You Like It|The Comedy of Errors|Coriolanus|Cymbeline|"
        "Hamlet|Henry IV|Henry V|Henry VI|Henry VIII|Julius Caesar|King John|King Lear|Love's Labour's Lost|Macbeth|"
        "Measure for Measure|The Merchant of Venice|The Merry Wives of Windsor|A Midsummer Night's Dream|"
        "Much Ado About Nothing|Othello|Pericles|Richard II|Richard III|Romeo and Juliet|The Taming of the Shrew|"
        "The Tempest|Timon of Athens|Titus Andronicus|Troilus and Cressida|Twelfth Night|"
        "The Two Gentlemen of Verona|The Two Noble Kinsmen|The Winter's Tale"
    ),
    "capital cities in Europe": (
        "Tirana|Andorra la Vella|Yerevan|Vienna|Baku|Minsk|Brussels|Sarajevo|Sofia|Zagreb|Nicosia|Prague|Copenhagen|"
        "Tallinn|Helsinki|Paris|Tbilisi|Berlin|Athens|Budapest|Reykjavik|Dublin|Rome|Pristina|Riga|Vaduz|Vilnius|"
        "Luxembourg|Valletta|Chisinau|Monaco|Podgorica|Amsterdam|Skopje|Oslo|Warsaw|Lisbon|Bucharest|Moscow|"
        "San Marino|Belgrade|Bratislava|Ljubljana|Madrid|Stockholm|Bern|Ankara|Kyiv|Kiev|London|Vatican City|"
        "Edinburgh|Cardiff|Belfast"
    ),
    "countries in North America": (
        "Antigua and Barbuda|Bahamas|The Bahamas|Barbados|Belize|Canada|Costa Rica|Cuba|Dominica|"
        "Dominican Republic|The Dominican Republic|El Salvador|Grenada|Guatemala|Haiti|Honduras|Jamaica|Mexico|"
        "Nicaragua|Panama|Saint Kitts and Nevis|Saint Lucia|Saint Vincent and the Grenadines|Trinidad and Tobago|"
        "United States|The United States|United States of America"
    ),
    "counties of Ireland": (
        "Antrim|Armagh|Carlow|Cavan|Clare|Cork|Derry|Londonderry|Donegal|Down|Dublin|Fermanagh|Galway|Kerry|Kildare|"
        "Kilkenny|Laois|Leitrim|Limerick|Longford|Louth|Mayo|Meath|Monaghan|Offaly|Roscommon|Sligo|Tipperary|Tyrone|"
        "Waterford|Westmeath|Wexford|Wicklow"
    ),
}
SETS = tuple(_TEXTS)
"""Names of the sets; the first four are the ones of a short trial."""
DEVELOPMENT = tuple(_DEVELOPMENT_TEXTS)
"""Names of sets on which settings may be chosen."""
GIVEN = {
    "states of the USA": ("Texas", "Ohio"),
    "chemical elements": ("iron", "helium"),
    "Greek letters": ("gamma", "pi"),
    "countries in Europe": ("France", "Poland"),
    "countries in Africa": ("Kenya", "Egypt"),
    "countries in Asia": ("Japan", "India"),
    "presidents of the United States": ("Abraham Lincoln", "Jimmy Carter"),
    "letters of the NATO alphabet": ("Bravo", "Tango"),
    "provinces of France": ("Normandy", "Lorraine"),
    "counties of England": ("Kent", "Dorset"),
    "capitals of the states of the USA": ("Denver", "Boston"),
    "books of the Bible": ("Exodus", "Romans"),
    "plays by William Shakespeare": ("Macbeth", "The Tempest"),
    "capital cities in Europe": ("Vienna", "Oslo"),
    "countries in North America": ("Canada", "Cuba"),
    "counties of Ireland": ("Cork", "Mayo"),
}
"""Two members of each, to begin a list with."""
_SAME = {
    "aluminium": "aluminum",
    "sulphur": "sulfur",
    "caesium": "cesium",
    "czechia": "czech republic",
    "burma": "myanmar",
    "swaziland": "eswatini",
    "macedonia": "north macedonia",
    "the netherlands": "netherlands",
    "alfa": "alpha",
    "the gambia": "gambia",
    "the philippines": "philippines",
    "juliett": "juliet",
    "xray": "x-ray",
    "james polk": "james k. polk",
    "ulysses grant": "ulysses s. grant",
    "james garfield": "james a. garfield",
    "chester arthur": "chester a. arthur",
    "warren harding": "warren g. harding",
    "durham": "county durham",
    "franklin roosevelt": "franklin d. roosevelt",
    "harry truman": "harry s. truman",
    "greater london": "london",
    "dwight eisenhower": "dwight d. eisenhower",
    "john kennedy": "john f. kennedy",
    "george bush": "george w. bush",
    "lyndon johnson": "lyndon b. johnson",
    "george h.w. bush": "george h. w. bush",
    "st. paul": "saint paul",
    "psalm": "psalms",
    "song of songs": "song of solomon",
    "kiev": "kyiv",
    "the bahamas": "bahamas",
    "the dominican republic": "dominican republic",
    "the united states": "united states",
    "united states of america": "united states",
    "londonderry": "derry",
}


def name_of(answer: str) -> str:
    """One name of a thing: without case and spare white space, and the usual one of several."""
    plain = " ".join(answer.casefold().split())
    return _SAME.get(plain, plain)


def members(name: str) -> frozenset[str]:
    """All members of a set but those that are given, by `name_of`."""
    return frozenset(map(name_of, {**_TEXTS, **_DEVELOPMENT_TEXTS}[name].split("|"))) - frozenset(
        map(name_of, GIVEN[name])
    )
