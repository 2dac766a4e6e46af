"""Closed sets with all their members: what can be asked as a list, and judged without a judge.

`SETS` says what a list of each is called; `members` gives the names of a set, other names of the same thing mapped to
one by `name_of`. Facts, written down here.
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
SETS = tuple(_TEXTS)
"""Names of the sets; the first four are the ones of a short trial."""
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
}


def name_of(answer: str) -> str:
    """One name of a thing: without case and spare white space, and the usual one of several."""
    plain = " ".join(answer.casefold().split())
    return _SAME.get(plain, plain)


def members(name: str) -> frozenset[str]:
    """All members of a set but those that are given, by `name_of`."""
    return frozenset(map(name_of, _TEXTS[name].split("|"))) - frozenset(map(name_of, GIVEN[name]))
